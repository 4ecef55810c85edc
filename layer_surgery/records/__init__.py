"""The typed records that stages exchange. Each can be written as JSON and read back."""

from layer_surgery.records.evaluation import (
    Comparison,
    Continuation,
    EvaluationReport,
    EvaluationResult,
    Interval,
    KlDivergence,
    Perplexity,
    PerplexityChange,
    SpeedPoint,
    StageFailure,
    TaskMetric,
    TaskResult,
    Top1Agreement,
)
from layer_surgery.records.healing import (
    CurvePoint,
    HealingRecord,
    LocalRecord,
    LossRecord,
    ProbePoint,
    TeacherRecord,
    UnhealedRecord,
)
from layer_surgery.records.plan import (
    PLAN_SCHEMA_VERSION,
    UNITS,
    Action,
    LayerPlan,
    Part,
    RefitScope,
    SurgeryPlan,
    UnitName,
)
from layer_surgery.records.surgery import (
    REPORT_SCHEMA_VERSION,
    LayerScores,
    RefitRecord,
    SpectrumMetric,
    SpectrumRecord,
    SurgeryReport,
)
