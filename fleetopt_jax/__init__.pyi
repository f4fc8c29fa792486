"""The public names, by topic: the one list that type checkers, the API pages and the imports of `__init__` read."""

# rooms
from . import calibrate as calibrate
from . import catalog as catalog
from . import core as core
from . import documents as documents
from . import fleet as fleet
from . import laws as laws
from . import published as published
from . import report as report
from . import workload as workload

# run
from ._optimize.compare import compare as compare
from ._optimize.confidence import confident as confident
from ._optimize.failures import resilience as resilience
from ._optimize.growth import purchases as purchases
from ._optimize.holding import holding as holding
from ._optimize.levers import pull_levers as pull_levers
from ._optimize.pareto import pareto as pareto
from ._optimize.robust import robust as robust
from ._optimize.schedule import schedule as schedule
from ._optimize.repair import Repair as Repair
from ._optimize.repair import repair as repair
from ._optimize.search import evaluate_given as evaluate_given
from ._optimize.search import optimize as optimize
from ._optimize.sensitivity import sensitivity as sensitivity
from ._optimize.services_front import promise_front as promise_front
from ._optimize.services_front import services_front as services_front
from ._optimize.services_front import stricter as stricter
from ._optimize.services_levers import services_levers as services_levers
from ._optimize.shared import optimize_services as optimize_services
from ._simulate.day import replay_day as replay_day
from ._simulate.requests import replay_requests as replay_requests
from ._simulate.simulate import simulate as simulate
from ._simulate.verify import verify as verify
from ._sweep.sweep import sweep as sweep
from .fleet.evaluate import evaluate as evaluate
from .fleet.sizing import size_fleet as size_fleet
from .published.ledger import ledger as ledger
from .published.stack import stack_ledger as stack_ledger
from .published.tables import reproduce as reproduce

# ask
from ._optimize.problem import Period as Period
from ._optimize.problem import Problem as Problem
from ._optimize.problem import Service as Service
from ._optimize.problem import make_problem as make_problem
from ._optimize.services import Purchase as Purchase
from ._optimize.services import Services as Services
from ._optimize.services import make_services as make_services
from ._optimize.running import Running as Running
from ._optimize.running import make_running as make_running
from .catalog.rates import hours_named as hours_named
from .workload.hours import Hours as Hours
from .workload.hours import make_hours as make_hours
from .fleet.fleet import Slo as Slo
from .fleet.fleet import make_slo as make_slo
from .fleet.resources import Budget as Budget
from .fleet.resources import Resources as Resources
from .fleet.resources import Weights as Weights
from .fleet.resources import make_budget as make_budget

# answers
from ._optimize.compare import Comparison as Comparison
from ._optimize.compare import ObservedFigure as ObservedFigure
from ._optimize.confidence import Confident as Confident
from ._optimize.failures import PoolLosses as PoolLosses
from ._optimize.failures import Resilience as Resilience
from ._optimize.holding import Holding as Holding
from ._optimize.pareto import Front as Front
from ._optimize.growth import Quarter as Quarter
from ._optimize.plan import BrokenLimit as BrokenLimit
from ._optimize.plan import Infeasible as Infeasible
from ._optimize.schedule import DayPlan as DayPlan
from ._optimize.schedule import Schedule as Schedule
from ._optimize.plan import Plan as Plan
from ._optimize.plan import Unreachable as Unreachable
from ._optimize.plan import is_plan as is_plan
from ._optimize.plan import require_plan as require_plan
from ._optimize.services import NoServicesPlan as NoServicesPlan
from ._optimize.services import ServicesPlan as ServicesPlan
from ._optimize.services_front import PromiseFront as PromiseFront
from ._optimize.services_front import ServicesFront as ServicesFront
from ._optimize.services_front import StricterPromises as StricterPromises
from ._optimize.services_levers import ServicesLevers as ServicesLevers
from ._simulate.day import Day as Day
from ._simulate.day import ReplayedDay as ReplayedDay
from ._simulate.simulate import Simulation as Simulation
from .fleet.evaluate import FleetMetrics as FleetMetrics
from .fleet.evaluate import PoolMetrics as PoolMetrics
from .fleet.evaluate import StageMetrics as StageMetrics

# fleets
from .fleet.fleet import Fleet as Fleet
from .fleet.fleet import Lane as Lane
from .fleet.fleet import Stage as Stage
from .fleet.fleet import fleet_of as fleet_of
from .fleet.fleet import make_fleet as make_fleet
from .fleet.reserve import Failures as Failures
from .fleet.reserve import Reserve as Reserve
from .fleet.reserve import make_failures as make_failures
from .fleet.reserve import make_spares as make_spares
from .fleet.reserve import make_target as make_target
from .fleet.surroundings import Site as Site
from .fleet.surroundings import Surroundings as Surroundings
from .fleet.surroundings import make_site as make_site
from .fleet.surroundings import make_surroundings as make_surroundings
from .laws.compression import Compressor as Compressor
from .laws.compression import make_compressor as make_compressor

# engines
from .catalog.architecture import Architecture as Architecture
from .catalog.engines import EngineEntry as EngineEntry
from .catalog.engines import build as build
from .catalog.engines import engine_entry as engine_entry
from .catalog.drafts import DraftHead as DraftHead
from .catalog.drafts import Drafts as Drafts
from .catalog.drafts import drafts_of as drafts_of
from .catalog.gpus import GpuEntry as GpuEntry
from .catalog.links import build_pair as build_pair
from .catalog.links import kv_link as kv_link
from .catalog.llms import LlmEntry as LlmEntry
from .catalog.own import Catalog as Catalog
from .catalog.spec import EngineSpec as EngineSpec
from .catalog.spec import KvLink as KvLink
from .catalog.spec import OwnLaws as OwnLaws
from .catalog.spec import TwoStageSpec as TwoStageSpec
from .fleet.engine import Engine as Engine
from .fleet.engine import EnginePair as EnginePair
from .fleet.engine import at_clock as at_clock
from .fleet.engine import at_power_limit as at_power_limit
from .fleet.engine import make_engine as make_engine
from .fleet.engine import measured_engine as measured_engine
from .fleet.engine import roofline_engine as roofline_engine
from .fleet.engine import speculating as speculating
from .laws.decode import DecodeLaw as DecodeLaw
from .laws.decode import DecodeStep as DecodeStep
from .laws.decode import make_decode_step as make_decode_step
from .laws.hand_over import HandOver as HandOver
from .laws.hand_over import make_hand_over as make_hand_over
from .laws.hardware import Gpu as Gpu
from .laws.hardware import make_gpu as make_gpu
from .laws.kv_cache import KvCapacity as KvCapacity
from .laws.kv_cache import make_kv_capacity as make_kv_capacity
from .laws.llm import Llm as Llm
from .laws.llm import make_llm as make_llm
from .laws.measured import b200_law as b200_law
from .laws.measured import h100_law as h100_law
from .laws.power import ActivityPower as ActivityPower
from .laws.power import LogisticPower as LogisticPower
from .laws.power import PowerLaw as PowerLaw
from .laws.factors import make_step_factors as make_step_factors
from .laws.power import make_logistic_power as make_logistic_power
from .laws.prefill import Prefill as Prefill
from .laws.prefill import make_prefill as make_prefill
from .laws.prefix_cache import HostCache as HostCache
from .laws.prefix_cache import WorkingSet as WorkingSet
from .laws.speculation import Speculation as Speculation
from .laws.speculation import make_speculation as make_speculation
from .laws.prefix_cache import make_host_cache as make_host_cache
from .laws.prefix_cache import make_working_set as make_working_set

# assumptions, and what a record of one's own derives from
from .core.struct import pytree as pytree
from .core.struct import static as static
from .fleet.assumptions import PHYSICAL as PHYSICAL
from .fleet.assumptions import PUBLISHED as PUBLISHED
from .fleet.assumptions import Assumptions as Assumptions
from .fleet.assumptions import parse_assumptions as parse_assumptions
from .fleet.choices.compression import Compression as Compression
from .fleet.choices.dispatch import Dispatch as Dispatch
from .fleet.choices.dispatch import BoundedHashing as BoundedHashing
from .fleet.choices.dispatch import PrefixAffinity as PrefixAffinity
from .fleet.choices.dispatch import Queues as Queues
from .fleet.choices.kv_cache import KvPolicy as KvPolicy
from .fleet.choices.lengths import Lengths as Lengths
from .fleet.choices.occupancy import Occupancy as Occupancy
from .fleet.choices.occupancy import Operation as Operation
from .fleet.choices.power_scope import PowerScope as PowerScope
from .fleet.choices.prefix_cache import ConstantHits as ConstantHits
from .fleet.choices.prefix_cache import NoPrefixCache as NoPrefixCache
from .fleet.choices.prefix_cache import PrefixCache as PrefixCache
from .fleet.choices.prefix_cache import WorkingSetCache as WorkingSetCache
from .fleet.choices.prefill import PrefillPolicy as PrefillPolicy
from .fleet.choices.routing_key import RoutingKey as RoutingKey
from .fleet.choices.tail import Delay as Delay
from .fleet.choices.tail import MeanPrefillTail as MeanPrefillTail
from .fleet.choices.tail import QuantileTail as QuantileTail
from .fleet.choices.tail import Tail as Tail
from .fleet.stage import StageState as StageState

# workloads
from .catalog.workloads import load_workload as load_workload
from .workload.atoms import Workload as Workload
from .workload.atoms import make_workload as make_workload
from .workload.columns import Columns as Columns
from .workload.reuse import Reuse as Reuse
from .workload.reuse import with_hit_curve as with_hit_curve

# files
from .core.errors import BadField as BadField
from .core.errors import BadInput as BadInput
from .documents.engine import load_engine as load_engine
from .documents.observed import load_observed as load_observed
from .documents.own_catalog import load_catalog as load_catalog
from .documents.engine import save_engine as save_engine
from .documents.front import front_to_json as front_to_json
from .documents.front import load_front as load_front
from .documents.front import save_front as save_front
from .documents.plan import load_plan as load_plan
from .documents.plan import plan_to_json as plan_to_json
from .documents.plan import save_plan as save_plan
from .documents.sweep import load_sweep as load_sweep
from .documents.simulation import load_simulation as load_simulation
from .documents.simulation import save_simulation as save_simulation

# benchmarks
from .calibrate.benchmarks import fit_benchmarks as fit_benchmarks
from .calibrate.points import read_points as read_points
from .documents.predict import predict as predict
from .laws.closed_loop import Benchmark as Benchmark

# calibration
from .calibrate.factors import fit_factors as fit_factors
from .calibrate.fit import fit_decode as fit_decode
from .calibrate.fit import fit_power as fit_power
from .calibrate.measurements import read_measurements as read_measurements

__version__: str
__all__: list[str]
