"""initialize_model_parallel and its getters, on every rank, against coordinates in the grid."""

import inspect
import json
import re
import socket

import pytest
import torch
import torch.distributed as dist

import command
import pool
from longspan import parallel_state
from longspan.config.sizes import MeshSizes
from longspan.mesh.mesh import ParallelMesh

GROUPS = {  # getter's stem -> axes inside the group
    "tensor_model_parallel": ("tp",),
    "context_parallel": ("cp",),
    "data_parallel": ("dp",),
    "pipeline_model_parallel": ("pp",),
    "tensor_and_context_parallel": ("tp", "cp"),
    "tensor_and_data_parallel": ("tp", "dp"),
    "model_parallel": ("tp", "pp"),
}
EXPERT_GROUPS = {
    "expert_model_parallel": ("ep",),
    "expert_tensor_parallel": ("tp",),
    "expert_data_parallel": ("dp",),
    "expert_tensor_and_model_parallel": ("tp", "ep"),
}


AXES = (
    *("tensor_model_parallel", "data_parallel", "context_parallel", "pipeline_model_parallel"),
    "expert_model_parallel",
)


def expected_ranks(sizes, order, axes):
    """Ranks that share all other coordinates with this one; the leftmost axis of the order varies fastest."""

    def place(rank):
        found = {}
        for axis in order:
            rank, found[axis] = divmod(rank, sizes[axis])
        return found

    mine = place(dist.get_rank())
    return [
        rank
        for rank in range(dist.get_world_size())
        if all(place(rank)[axis] == mine[axis] for axis in order if axis not in axes)
    ]


def check_groups(getters, sizes, order):
    rank = dist.get_rank()
    for stem, axes in getters.items():
        ranks = expected_ranks(sizes, order, axes)
        group = getattr(parallel_state, f"get_{stem}_group")()
        assert dist.get_process_group_ranks(group) == ranks, stem
        total = torch.tensor([float(rank)])
        dist.all_reduce(total, group=group)
        assert total.item() == sum(ranks), stem
        for suffix, value in (
            ("world_size", len(ranks)),
            ("rank", ranks.index(rank)),
            ("global_ranks", ranks),
            ("src_rank", ranks[0]),
            ("first_rank", ranks[0]),
            ("last_rank", ranks[-1]),
            ("next_rank", ranks[(ranks.index(rank) + 1) % len(ranks)]),
            ("prev_rank", ranks[ranks.index(rank) - 1]),
        ):
            getter = getattr(parallel_state, f"get_{stem}_{suffix}", None)
            assert (
                getter is not None
                or suffix not in ("world_size", "rank")
                or "_and_" in stem
                or stem == "model_parallel"
            )
            if getter is not None:
                assert getter() == value, (stem, suffix)


def check_layout(tp, cp, pp, ep=1, etp=None, order="tp-cp-ep-dp-pp", replicate=1):
    world = dist.get_world_size()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        order=order,
        data_parallel_replicate_size=replicate,
    )
    assert parallel_state.model_parallel_is_initialized()
    names = order.split("-")
    dense = {"tp": tp, "cp": cp, "ep": 1, "dp": world // (tp * cp * pp), "pp": pp}
    check_groups(GROUPS, dense, names)
    etp = etp or tp
    expert = {"tp": etp, "cp": 1, "ep": ep, "dp": world // (etp * ep * pp), "pp": pp}
    check_groups(EXPERT_GROUPS, expert, names)

    ranks = expected_ranks(dense, names, ("dp", "cp"))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    assert dist.get_process_group_ranks(group) == ranks
    assert parallel_state.get_data_parallel_world_size(with_context_parallel=True) == len(ranks)
    assert parallel_state.get_data_parallel_rank(with_context_parallel=True) == ranks.index(dist.get_rank())

    assert parallel_state.get_data_parallel_src_rank(with_context_parallel=True) == ranks[0]
    every = expected_ranks(dense, names, ("tp", "dp", "cp"))
    for group in (
        parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        parallel_state.get_amax_reduction_group(with_context_parallel=True),
    ):
        assert dist.get_process_group_ranks(group) == every
    for flags, axes in (
        ((False, False), ("tp", "dp")),
        ((False, True), ("tp",)),
        ((True, True), ("tp", "cp")),
    ):
        group = parallel_state.get_amax_reduction_group(*flags)
        assert dist.get_process_group_ranks(group) == expected_ranks(dense, names, axes)
    places = [getattr(parallel_state, f"get_{axis}_rank")() for axis in AXES]
    assert parallel_state.get_all_ranks() == "_".join(map(str, places))

    stage = parallel_state.get_pipeline_model_parallel_rank()
    assert parallel_state.is_pipeline_first_stage() == (stage == 0)
    assert parallel_state.is_pipeline_last_stage() == (stage == pp - 1)
    assert parallel_state.is_rank_0() == (dist.get_rank() == 0)

    # where parameters live: the same ranks, as (pp, dp_replicate, fsdp, tp)
    mesh = parallel_state.get_mesh().device_mesh
    assert mesh.mesh_dim_names == ("pp", "dp_replicate", "fsdp", "tp")
    assert tuple(mesh.mesh.shape) == (pp, replicate, dense["dp"] // replicate * cp, tp)
    assert mesh["tp"].mesh.tolist() == expected_ranks(dense, names, ("tp",))
    fsdp = mesh["fsdp"].mesh.tolist()
    if replicate == 1:
        assert sorted(fsdp) == ranks
    else:
        assert sorted(mesh["dp_replicate", "fsdp"].mesh.flatten().tolist()) == ranks
    check_expert_mesh(pp, replicate, expert, names)
    parallel_state.destroy_model_parallel()
    assert not parallel_state.model_parallel_is_initialized()


def check_expert_mesh(pp, replicate, expert, names):
    """Where experts live: the same ranks, as (pp, edp_replicate, edp, ep, etp); no group twice."""
    whole = parallel_state.get_mesh()
    mesh, groups = whole.expert_mesh, whole.groups
    assert mesh.mesh_dim_names == ("pp", "edp_replicate", "edp", "ep", "etp")
    assert tuple(mesh.mesh.shape) == (pp, replicate, expert["dp"] // replicate, expert["ep"], expert["tp"])
    for name, axis in (("pp", "pp"), ("ep", "ep"), ("etp", "tp")):
        assert mesh[name].mesh.tolist() == expected_ranks(expert, names, (axis,))
        assert dist.get_process_group_ranks(mesh.get_group(name)) == mesh[name].mesh.tolist()
    assert mesh["edp_replicate", "edp"].mesh.flatten().tolist() == expected_ranks(expert, names, ("dp",))
    assert groups.expert_mesh.get_group("ep") is groups.ep
    assert groups.expert_mesh.get_group("etp") is groups.etp
    total = torch.tensor([1.0])
    dist.all_reduce(total, group=mesh.get_group("edp"))
    assert total.item() == expert["dp"] // replicate

    every = [*whole.device_mesh.get_all_groups(), *mesh.get_all_groups()]
    every += [group for group in vars(groups).values() if isinstance(group, dist.ProcessGroup)]
    exchanges = [groups.cp, groups.dp_cp]
    by_ranks = {}
    for group in every:
        if all(group is not other for other in exchanges):
            by_ranks.setdefault(tuple(dist.get_process_group_ranks(group)), set()).add(group.group_name)
    sizes = {ranks: len(names) for ranks, names in by_ranks.items() if len(ranks) > 1}
    assert set(sizes.values()) <= {1}, sizes


def made_groups(sizes):
    """How many groups of more than one rank a mesh makes, and those of its expert DeviceMesh among them."""
    before = set(dist.distributed_c10d._world.pg_map)
    mesh = ParallelMesh.build(sizes)
    new = {g.group_name for g in set(dist.distributed_c10d._world.pg_map) - before if g.size() > 1}
    of_experts = {g.group_name for g in mesh.expert_mesh.get_all_groups()}
    of_dense = {g.group_name for g in mesh.device_mesh.get_all_groups()}
    return len(new), len((of_experts - of_dense) & new)


@pytest.mark.parametrize(
    ("sizes", "groups", "of_experts"),
    [
        (MeshSizes(cp=2), 1, 0),  # cp; fsdp is the default group
        (MeshSizes(dp_shard=2), 1, 0),
        (MeshSizes(cp=2, dp_replicate=2), 4, 0),
        (MeshSizes(tp=2, cp=2), 3, 0),
        (MeshSizes(dp_shard=4, ep=2), 3, 2),
    ],
    ids=str,
)
def test_few_groups_are_made(sizes, groups, of_experts):
    """Each takes threads over gloo, and a communicator on a GPU. Without expert parallelism experts add none."""
    assert set(pool.run(sizes.world_size, made_groups, sizes)) == {(groups, of_experts)}


def check_layouts(layouts):
    """One after the other in one process: destroy_model_parallel makes room for the next."""
    for layout in layouts:
        check_layout(**layout)


def test_every_group_and_getter():
    pool.run(
        4,
        check_layouts,
        [
            dict(tp=1, cp=1, pp=1),
            dict(tp=2, cp=2, pp=1),
            dict(tp=2, cp=1, pp=2),
            dict(tp=1, cp=2, pp=1, replicate=2),
            dict(tp=1, cp=1, pp=2, order="tp-cp-ep-pp-dp"),
            dict(tp=1, cp=2, pp=1, order="dp-tp-cp-ep-pp"),
            dict(tp=2, cp=2, pp=1, ep=4, etp=1),  # the ranks of attention folded into experts
            dict(tp=2, cp=1, pp=1, ep=2),
            dict(tp=1, cp=2, pp=2, ep=2),
            dict(tp=2, cp=1, pp=1, replicate=2, etp=1),
            dict(tp=1, cp=2, pp=1, replicate=2, ep=2),
        ],
    )


def test_layouts_of_three_ranks():
    pool.run(3, check_layouts, [dict(tp=3, cp=1, pp=1), dict(tp=1, cp=3, pp=1), dict(tp=1, cp=1, pp=1, ep=3)])


def hierarchy():
    rank = dist.get_rank()
    for sizes, levels in (
        ([2, 2], [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]),
        ([4, 1], [[[0, 1, 2, 3]], [[0], [1], [2], [3]]]),
    ):
        parallel_state.initialize_model_parallel(
            context_parallel_size=4, hierarchical_context_parallel_sizes=sizes
        )
        groups = parallel_state.get_hierarchical_context_parallel_groups()
        for group, level in zip(groups, levels, strict=True):
            mine = next(ranks for ranks in level if rank in ranks)
            assert dist.get_process_group_ranks(group) == mine
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=4)
    with pytest.raises(RuntimeError, match="hierarchical_context_parallel_sizes"):
        parallel_state.get_hierarchical_context_parallel_groups()
    assert parallel_state.get_hierarchical_context_parallel_groups(check_initialized=False) is None
    parallel_state.destroy_model_parallel()
    with pytest.raises(ValueError, match=r"2 x 4 = 8.*4 ranks"):
        parallel_state.initialize_model_parallel(
            context_parallel_size=4, hierarchical_context_parallel_sizes=[2, 4]
        )


def test_hierarchical_context_parallel_groups():
    pool.run(4, hierarchy)


def virtual_stages():
    rank = dist.get_rank()
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3
    )
    assert parallel_state.get_virtual_pipeline_model_parallel_world_size() == 3
    assert parallel_state.get_virtual_pipeline_model_parallel_rank() == 0
    first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    assert first(ignore_virtual=False) == (rank == 0)
    assert not last(ignore_virtual=False)
    parallel_state.set_virtual_pipeline_model_parallel_rank(2)
    assert not first(ignore_virtual=False)
    assert last(ignore_virtual=False) == (rank == 1)
    assert (first(), last()) == (rank == 0, rank == 1)
    parallel_state.destroy_model_parallel()
    assert parallel_state.get_virtual_pipeline_model_parallel_world_size() is None
    with pytest.raises(
        RuntimeError, match=r"virtual_pipeline_model_parallel_size 2.*at least 2 pipeline stages"
    ):
        parallel_state.initialize_model_parallel(virtual_pipeline_model_parallel_size=2)
    assert not parallel_state.model_parallel_is_initialized()


def test_virtual_pipeline_stages():
    pool.run(2, virtual_stages)


def refusals():
    start = parallel_state.initialize_model_parallel
    with pytest.raises(
        ValueError, match=r"tensor 3 x context 1 x pipeline 1 = 3 does not divide 2 processes"
    ):
        start(tensor_model_parallel_size=3)
    with pytest.raises(ValueError, match=r"tensor 0 x context 1 x pipeline 1.*at least 1"):
        start(tensor_model_parallel_size=0)
    with pytest.raises(ValueError, match=r"etp 1 x ep 3 x pp 1 does not divide 2 processes"):
        start(expert_model_parallel_size=3)
    with pytest.raises(ValueError, match=r"data_parallel_replicate_size 4 does not divide.*2.*divisor"):
        start(data_parallel_replicate_size=4)
    with pytest.raises(
        ValueError, match=r"edp 1 .*does not divide by dp_replicate 2: each copy of the model"
    ):
        start(data_parallel_replicate_size=2, expert_model_parallel_size=2)
    with pytest.raises(RuntimeError, match=r"tp has size 2 but order 'cp-ep-dp-pp' does not name it"):
        start(tensor_model_parallel_size=2, order="cp-ep-dp-pp")
    with pytest.raises(RuntimeError, match=r"ep has size 2 but order 'tp-cp-dp-pp' does not name it"):
        start(expert_model_parallel_size=2, order="tp-cp-dp-pp")
    with pytest.raises(
        ValueError, match=r"tp 2 x cp 2 x dp_shard 1 x dp_replicate 1 x pp 1 = 4, but there are 2 processes"
    ):
        ParallelMesh.build(MeshSizes(tp=2, cp=2))
    assert not parallel_state.model_parallel_is_initialized()
    start(context_parallel_size=2)  # after all that, a right call still works
    with pytest.raises(RuntimeError, match=r"already initialised.*destroy_model_parallel"):
        start(context_parallel_size=2)
    assert parallel_state.get_context_parallel_world_size() == 2


def test_refusals_leave_nothing_behind():
    pool.run(2, refusals)


def two_grids():
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2, expert_tensor_parallel_size=2, order="tp-cp-ep-pp-dp"
    )
    groups = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
    )
    return [dist.get_process_group_ranks(group) for group in groups]


def test_experts_lie_on_the_ranks_of_their_stage_at_every_order():
    """Stages 0 and 1 have the ranks 0, 2 and 1, 3 where the pipeline comes before data parallelism."""
    assert pool.run(4, two_grids) == [
        [[0, 1], [0, 2]], [[0, 1], [1, 3]], [[2, 3], [0, 2]], [[2, 3], [1, 3]],
    ]  # fmt: skip


def getters():
    return [
        function
        for name, function in vars(parallel_state).items()
        if name.startswith("get_") and inspect.isfunction(function)
    ]


def test_getters_before_initialisation():
    assert len(getters()) > 30
    for getter in getters():
        assert inspect.signature(getter).parameters["check_initialized"].default is True, getter.__name__
        assert getter(check_initialized=False) is None, getter.__name__
        if "virtual" not in getter.__name__:
            with pytest.raises(RuntimeError, match="initialize_model_parallel"):
                getter()
    assert not parallel_state.model_parallel_is_initialized()
    assert parallel_state.is_rank_0()


#: every public name of Megatron-LM's parallel_state that scripts call: here, or answered with what to use
MEGATRON = """
initialize_model_parallel is_initialized is_unitialized model_parallel_is_initialized destroy_model_parallel
get_model_parallel_group get_model_parallel_src_rank get_nccl_options update_pg_timeout create_group
create_hierarchical_groups generate_masked_orthogonal_rank_groups RankGenerator
default_embedding_ranks default_position_embedding_ranks overwrite_nccl_comm_cfgs
get_tensor_model_parallel_group get_tensor_model_parallel_world_size get_tensor_model_parallel_rank
get_tensor_model_parallel_src_rank set_tensor_model_parallel_world_size set_tensor_model_parallel_rank
get_pipeline_model_parallel_group get_pipeline_model_parallel_world_size get_pipeline_model_parallel_rank
get_pipeline_model_parallel_first_rank get_pipeline_model_parallel_last_rank get_pipeline_model_parallel_next_rank
get_pipeline_model_parallel_prev_rank set_pipeline_model_parallel_world_size set_pipeline_model_parallel_rank
get_virtual_pipeline_model_parallel_rank set_virtual_pipeline_model_parallel_rank
get_virtual_pipeline_model_parallel_world_size set_virtual_pipeline_model_parallel_world_size
is_pipeline_first_stage is_pipeline_last_stage get_pipeline_model_parallel_split_rank
get_data_parallel_group get_data_parallel_group_gloo get_data_parallel_world_size get_data_parallel_rank
get_data_parallel_src_rank set_data_parallel_rank has_separate_all_gather_group
get_context_parallel_group get_context_parallel_global_ranks get_context_parallel_world_size get_context_parallel_rank
get_hierarchical_context_parallel_groups get_hybrid_data_context_parallel_groups
get_embedding_group get_position_embedding_group is_rank_in_embedding_group is_rank_in_position_embedding_group
get_amax_reduction_group get_tensor_and_data_parallel_group get_tensor_and_context_parallel_group
get_tensor_and_context_parallel_world_size get_tensor_and_context_parallel_rank
get_expert_model_parallel_group get_expert_model_parallel_src_rank get_expert_model_parallel_world_size
get_expert_model_parallel_rank set_expert_model_parallel_world_size set_expert_model_parallel_rank
get_expert_tensor_parallel_group get_expert_tensor_parallel_world_size get_expert_tensor_parallel_rank
set_expert_tensor_parallel_world_size set_expert_tensor_parallel_rank
get_expert_tensor_and_model_parallel_group get_expert_tensor_and_model_parallel_world_size
get_expert_tensor_and_model_parallel_rank get_expert_tensor_model_pipeline_parallel_group
get_expert_data_parallel_group get_expert_data_parallel_group_gloo get_expert_data_parallel_rank
get_expert_data_parallel_world_size get_data_modulo_expert_parallel_group
get_intra_distributed_optimizer_instance_group get_inter_distributed_optimizer_instance_group
get_global_memory_buffer get_global_symmetric_memory_buffer destroy_global_memory_buffer
destroy_global_symmetric_memory_buffer get_all_ranks
_CONTEXT_PARALLEL_GROUP _DATA_PARALLEL_GROUP_WITH_CP _MODEL_PARALLEL_GROUP
"""


def answer(name):
    """The message of the AttributeError for a name."""
    try:
        getattr(parallel_state, name)
    except AttributeError as error:
        return str(error)
    return ""


def test_every_name_of_megatrons_is_here_or_answers_with_what_to_use():
    answers = {name: answer(name) for name in MEGATRON.split() if name not in vars(parallel_state)}
    assert not {
        name: text for name, text in answers.items() if not re.search(rf"has no {name}\. Instead: \w+", text)
    }
    getter = r"(?<![.\w])(get_\w+|initialize_model_parallel|destroy_model_parallel)\("
    assert not [
        (name, other)
        for name, text in answers.items()
        for other in re.findall(getter, text)
        if not callable(getattr(parallel_state, other, None))
    ]


def test_a_misspelt_getter_is_told_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean get_context_parallel_rank"):
        parallel_state.get_contxt_parallel_rank  # noqa: B018
    assert not hasattr(parallel_state, "get_embedding_group")


# --- processes of their own: no pool, no init_process_group ---------------------------------

UNDER_TORCHRUN = """
import json, sys
import torch
import torch.distributed as dist
from longspan import parallel_state

assert not dist.is_initialized()
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
total = torch.tensor([1.0 + parallel_state.get_tensor_model_parallel_rank()])
dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
with open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w") as file:
    json.dump([total.item(), parallel_state.get_tensor_model_parallel_global_ranks(), dist.get_backend()], file)
dist.barrier()
dist.destroy_process_group()
"""

ALONE = """
import json
from longspan import parallel_state
parallel_state.initialize_model_parallel()
import torch.distributed as dist
print(json.dumps([dist.get_world_size(), dist.get_backend(), parallel_state.get_context_parallel_rank(),
                  parallel_state.get_data_parallel_global_ranks(with_context_parallel=True)]))
"""


def test_under_torchrun_it_starts_the_process_group(tmp_path):
    """With the variables that torchrun sets for its processes."""
    (tmp_path / "script.py").write_text(UNDER_TORCHRUN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        command.script("script.py", tmp_path, cwd=tmp_path, env=there | {"RANK": r, "LOCAL_RANK": r})
        for r in ("0", "1")
    ]
    for rank, process in enumerate(ranks):
        done = process.wait(60)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [3.0, [0, 1], "gloo"]


def test_a_plain_process_is_a_world_of_one(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "script.py").write_text(ALONE)
    done = command.script("script.py", cwd=tmp_path).wait(60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, "gloo", 0, [0]]
