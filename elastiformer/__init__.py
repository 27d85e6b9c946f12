"""Pretrained transformers whose every request sets how much compute it pays."""

from elastiformer.accounting import LayerShape, ModelShape
from elastiformer.adapter import Adapter, AdapterSpec
from elastiformer.calibration import Calibration, Measured, Schedule, Step
from elastiformer.capacity import (
    DENSE,
    Capacity,
    LayerPlan,
    Phase,
    Plan,
    Site,
    Unit,
    UnitShares,
    dense_plan,
    is_dense,
)
from elastiformer.errors import (
    AdapterError,
    BaseModelError,
    CapacityError,
    ElastiError,
    InputError,
    UnsupportedModel,
)
from elastiformer.masked import MaskedResult
from elastiformer.model import ElasticModel
from elastiformer.plan_grid import PlanGrid, Route, Selection
from elastiformer.saved_adapter import SavedAdapter
from elastiformer.sequence import Chunk, Sequence
from elastiformer.usage import Usage

__all__ = [
    "DENSE",
    "Adapter",
    "AdapterError",
    "AdapterSpec",
    "BaseModelError",
    "Calibration",
    "Capacity",
    "CapacityError",
    "Chunk",
    "ElastiError",
    "ElasticModel",
    "InputError",
    "LayerPlan",
    "LayerShape",
    "MaskedResult",
    "Measured",
    "ModelShape",
    "Phase",
    "Plan",
    "PlanGrid",
    "Route",
    "SavedAdapter",
    "Schedule",
    "Selection",
    "Sequence",
    "Site",
    "Step",
    "Unit",
    "UnitShares",
    "UnsupportedModel",
    "Usage",
    "dense_plan",
    "is_dense",
]
