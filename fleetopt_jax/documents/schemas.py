"""The JSON Schema of every file that is read."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from fleetopt_jax.calibrate.measurements import MeasurementsRow
from fleetopt_jax.catalog.hf_config import HfConfig
from fleetopt_jax.documents.drafts import DraftsFile
from fleetopt_jax.documents.engine import EngineFile
from fleetopt_jax.documents.own_catalog import CatalogFile
from fleetopt_jax.documents.plan_file import PlanFile
from fleetopt_jax.documents.schedule_file import ScheduleFile
from fleetopt_jax.documents.services_file import ServicesFile
from fleetopt_jax.documents.simulation import SimulationFile
from fleetopt_jax.workload.readers import CdfDocument


def schemas(others: Mapping[str, type[BaseModel]] | None = None) -> dict[str, Any]:
    """By what the file is; `others` are models of files that only a higher room reads, and come first."""
    models: dict[str, type[BaseModel]] = {
        **(others or {}),
        "plan": PlanFile,
        "engine": EngineFile,
        "catalog": CatalogFile,
        "drafts": DraftsFile,
        "simulation": SimulationFile,
        "services": ServicesFile,
        "schedule": ScheduleFile,
        "CDF": CdfDocument,
        "Hugging Face config": HfConfig,
        "row of measurements": MeasurementsRow,
    }
    return {name: model.model_json_schema() for name, model in models.items()}
