"""Every option, declared once: name, type, default, unit, help and check.

The options of the command line (`cli/options.py`) and the keyword arguments of the Python interface (`api.py`) are
derived from the classes here. A class is a group of options; a command takes a class that inherits the groups it needs.
"""

from layer_surgery.config.commands import (
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    HealConfig,
    ScoreConfig,
    SweepConfig,
    VerifyConfig,
)
from layer_surgery.config.evaluation import (
    ContinuationConfig,
    EvaluationConfig,
    PerplexityConfig,
    SpeedConfig,
    TaskConfig,
)
from layer_surgery.config.healing import HealingConfig
from layer_surgery.config.inputs import CalibrationConfig
from layer_surgery.config.runtime import RuntimeConfig
from layer_surgery.config.surgery import (
    COMPONENTS,
    DEFAULT_COMPONENTS,
    DEFAULT_METHOD,
    DEFAULT_SCORER,
    LISTED_BELOW,
    UNIFORM_COMPONENTS,
    BudgetConfig,
    SearchConfig,
)
