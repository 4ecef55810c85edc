"""The words of the synthetic notes: common medical terms, with the abbreviations that clinicians write.

General knowledge, written down for this experiment: from no corpus of notes, and from no ontology. Each term has a
name; an abbreviation is optional.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

KINDS = ("disease", "medication", "dose", "route", "frequency", "symptom")
#: Kinds whose terms are partly held out for the external set; of doses, routes and frequencies there are few.
HELD_OUT_KINDS = ("disease", "medication", "symptom")
#: One term in so many is held out.
_HELD_OUT_EACH = 4

DISEASES = """
hypertension|HTN; type 2 diabetes|T2DM; type 1 diabetes|T1DM; atrial fibrillation|AF; heart failure|CHF;
coronary artery disease|CAD; chronic kidney disease|CKD; chronic obstructive pulmonary disease|COPD; asthma;
pneumonia|PNA; deep vein thrombosis|DVT; pulmonary embolism|PE; gastroesophageal reflux disease|GERD; hypothyroidism;
hyperthyroidism; hyperlipidemia|HLD; osteoarthritis|OA; rheumatoid arthritis|RA; gout; osteoporosis; depression|MDD;
generalized anxiety disorder|GAD; bipolar disorder; schizophrenia; epilepsy; migraine; stroke|CVA;
transient ischemic attack|TIA; multiple sclerosis|MS; Parkinson disease|PD; Alzheimer disease|AD; anemia; cirrhosis;
hepatitis C|HCV; pancreatitis; cholecystitis; diverticulitis; ulcerative colitis|UC; Crohn disease; celiac disease;
psoriasis; eczema; cellulitis; sepsis; urinary tract infection|UTI; pyelonephritis; nephrolithiasis;
benign prostatic hyperplasia|BPH; breast cancer; lung cancer; colon cancer; prostate cancer; melanoma; lymphoma;
obstructive sleep apnea|OSA; peripheral artery disease|PAD; aortic stenosis|AS; pericarditis; glaucoma; tuberculosis|TB;
endometriosis; sarcoidosis; systemic lupus erythematosus|SLE; acute kidney injury|AKI
"""
MEDICATIONS = """
lisinopril; metformin; amlodipine; atorvastatin; metoprolol; omeprazole; losartan; albuterol; gabapentin;
hydrochlorothiazide|HCTZ; sertraline; simvastatin; furosemide; pantoprazole; prednisone; warfarin; apixaban;
rivaroxaban; clopidogrel; aspirin|ASA; insulin glargine; levothyroxine; escitalopram; fluoxetine; bupropion; trazodone;
citalopram; tramadol; oxycodone; ibuprofen; naproxen; acetaminophen|APAP; amoxicillin; azithromycin; ciprofloxacin;
doxycycline; cephalexin; ceftriaxone; vancomycin; piperacillin; carvedilol; spironolactone; digoxin; diltiazem;
rosuvastatin; pravastatin; ezetimibe; glipizide; empagliflozin; sitagliptin; semaglutide; montelukast; tiotropium;
fluticasone; allopurinol; colchicine; methotrexate; hydroxychloroquine; tamsulosin; finasteride; donepezil; levodopa;
topiramate; lamotrigine; valproate; quetiapine; aripiprazole; heparin
"""
SYMPTOMS = """
chest pain|CP; shortness of breath|SOB; dyspnea on exertion|DOE; cough; fever; chills; fatigue; dizziness; headache|HA;
nausea; vomiting; diarrhea; constipation; abdominal pain; back pain; joint pain; leg swelling; palpitations; syncope;
weakness; numbness; tingling; blurred vision; weight loss; weight gain; night sweats; loss of appetite; insomnia;
dysuria; hematuria; urinary frequency; rash; itching; sore throat; nasal congestion; wheezing; orthopnea; dysphagia;
heartburn; bloating; melena; confusion; memory loss; tremor; muscle cramps; hoarseness; ear pain; neck stiffness;
easy bruising; hair loss; dry mouth; excessive thirst
"""
ROUTES = ("PO", "IV", "IM", "SC", "by mouth", "orally", "inhaled", "topically", "sublingually", "intravenously")
FREQUENCIES = (
    "daily", "BID", "TID", "QID", "QHS", "once daily", "twice daily", "three times daily", "every 6 hours",
    "every 8 hours", "every 12 hours", "q6h", "q8h", "weekly", "at bedtime", "as needed", "PRN", "every morning",
)  # fmt: skip
AMOUNTS = ("1", "2.5", "5", "10", "12.5", "20", "25", "40", "50", "75", "80", "100", "150", "250", "500", "850", "1000")
UNITS = (" mg", " mg", " mg", "mg", " mcg", " units", " mL", " g", " puffs", " tablets")


@dataclass(frozen=True)
class Term:
    """A disease, medication or symptom."""

    name: str
    abbreviation: str | None


def _terms(listed: str) -> tuple[Term, ...]:
    pairs = (" ".join(entry.split()).partition("|") for entry in listed.split(";"))
    return tuple(Term(name, short or None) for name, _, short in pairs)


TERMS = {"disease": _terms(DISEASES), "medication": _terms(MEDICATIONS), "symptom": _terms(SYMPTOMS)}


@dataclass(frozen=True)
class Lexicon:
    """Which terms notes may use, by kind; the two parts have none in common."""

    inner: dict[str, tuple[Term, ...]]
    held_out: dict[str, tuple[Term, ...]]


def split_terms(seed: int) -> Lexicon:
    """Hold out one term in four of each kind of `HELD_OUT_KINDS`, chosen by the seed."""
    draw = random.Random(f"terms {seed}")
    inner, held_out = {}, {}
    for kind in HELD_OUT_KINDS:
        shuffled = draw.sample(TERMS[kind], len(TERMS[kind]))
        cut = len(shuffled) // _HELD_OUT_EACH
        held_out[kind], inner[kind] = tuple(shuffled[:cut]), tuple(shuffled[cut:])
    return Lexicon(inner, held_out)
