"""The parallel plan: rank mesh and groups, pipeline stages, memory per rank."""

from simulator.plan.memory import MemoryReport, StageMemory, memory_report
from simulator.plan.mesh import Mesh
from simulator.plan.stages import assign_stages

__all__ = ["MemoryReport", "Mesh", "StageMemory", "assign_stages", "memory_report"]
