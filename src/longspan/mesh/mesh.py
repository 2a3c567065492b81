"""ParallelMesh: the process groups of one world, which are made once and passed as arguments.

Two grids consist of the same ranks:

    dense   tp  x cp x dp  x pp      attention, MLP, embeddings
    expert  etp x ep x edp x pp      mixture-of-experts layers

where dp = dp_shard x dp_replicate (dp_shard varies faster, so that shards stay close together).
Parameters are stored on a DeviceMesh ``(pp, dp_replicate, fsdp, tp)`` with
fsdp = dp_shard x cp, because context parallel ranks have different tokens and the same weights,
which for parameters is data parallelism. Parameters of experts are stored on a second DeviceMesh,
``(pp, edp_replicate, edp, ep, etp)``.

An axis of size 1 has a group too, of this rank alone, so no code needs a special case for it.
Groups with the same ranks are made once for both grids, with one exception: context parallel
exchanges do not share a group with FSDP, because they would wait until FSDP has gathered weights.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from longspan.config.sizes import MeshSizes
from longspan.errors import NotReached
from longspan.mesh.topology import ExpertGrid, RankGenerator, data_parallel_size, hierarchical_groups


@dataclass(frozen=True)
class ProcessGroupCollection:
    """The groups that a module may need, with Megatron's names. Modules take this collection, not a mesh."""

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    tp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    edp: dist.ProcessGroup
    tp_ep: dist.ProcessGroup
    tp_pp: dist.ProcessGroup
    tp_dp: dist.ProcessGroup
    tp_dp_cp: dist.ProcessGroup
    hcp: tuple[dist.ProcessGroup, ...] = ()
    #: The first and the last pipeline rank, which share a tied embedding; None between them and without a pipeline.
    ends: dist.ProcessGroup | None = None
    #: 1-D DeviceMesh of ``tp``, on which tensor parallel weights are stored as DTensors.
    tp_mesh: DeviceMesh | None = None
    #: 2-D DeviceMesh (ep, etp): where experts' weights live.
    expert_mesh: DeviceMesh | None = None


@dataclass(frozen=True)
class ParallelMesh:
    """All groups of one world. Make it with :meth:`build` on every rank at once."""

    sizes: MeshSizes
    groups: ProcessGroupCollection
    #: DeviceMesh (pp, dp_replicate, fsdp, tp), on which parameters are stored.
    device_mesh: DeviceMesh
    #: DeviceMesh (pp, edp_replicate, edp, ep, etp), on which parameters of experts are stored.
    expert_mesh: DeviceMesh
    dense: RankGenerator
    expert: RankGenerator

    @classmethod
    def build(cls, sizes: MeshSizes, device_type: str = "cpu", only_own: bool = False) -> ParallelMesh:
        """Makes every group of both grids. It is a collective: all ranks must call it, in the same order.

        Args:
            only_own: makes only the groups that this rank is in, for a process without other ranks: a plan of
                thousands of ranks would make tens of thousands of groups.

        Raises:
            ValueError: the product of the sizes is not the number of processes (the message has the
                equation), or the expert grid does not fit the same ranks.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        if sizes.world_size != world:
            raise ValueError(
                f"{sizes.equation(world)}. The product of the parallel sizes must be the number of processes."
            )
        etp = sizes.etp or sizes.tp
        try:
            edp = data_parallel_size(world, etp, sizes.ep, sizes.pp)
        except ValueError:
            raise ValueError(
                f"expert grid: etp {etp} x ep {sizes.ep} x pp {sizes.pp} does not divide {world} processes."
            ) from None
        if edp % sizes.dp_replicate:
            raise ValueError(
                f"expert grid: edp {edp} (of etp {etp} x ep {sizes.ep} x edp {edp} x pp {sizes.pp} = {world}) does not divide by "
                f"dp_replicate {sizes.dp_replicate}: each copy of the model has all experts. Choose a smaller ep, etp or "
                "dp_replicate."
            )
        dense = RankGenerator(sizes.tp, 1, sizes.dp, sizes.pp, sizes.cp, sizes.order)
        expert = ExpertGrid(dense, etp, sizes.ep, edp, sizes.order)

        wait = waiting_time()
        # The keys are the rank lists of a whole axis, not of this rank only, so that all ranks make the same
        # groups.
        made: dict[Axis, dist.ProcessGroup] = {}

        def group_of(rank_lists: list[list[int]]) -> dist.ProcessGroup:
            axis = _axis(rank_lists)
            if axis not in made:
                alone = all(len(ranks) == 1 for ranks in rank_lists)
                others = [ranks for ranks in rank_lists if rank in ranks] if only_own else rank_lists
                for ranks in [[rank]] if alone else others:
                    # A group of this rank alone concerns no other rank.
                    group = dist.new_group(ranks, timeout=wait, use_local_synchronization=alone)
                    if rank in ranks:
                        made[axis] = group
            return made[axis]

        storage = _grid(dense, ("pp", "dp", "cp", "tp"))
        storage = storage.reshape(sizes.pp, sizes.dp_replicate, sizes.dp_shard * sizes.cp, sizes.tp)
        names = ("pp", "dp_replicate", "fsdp", "tp")
        if only_own:
            device_mesh = DeviceMesh.from_group(
                [group_of(_lines(storage, dim)) for dim in range(4)],
                device_type,
                storage.contiguous(),
                mesh_dim_names=names,
            )
            # Context parallel exchanges do not share FSDP's groups here either.
            made.clear()
        else:
            device_mesh = DeviceMesh(device_type, storage.contiguous(), mesh_dim_names=names)
        for group in device_mesh.get_all_groups():
            # Torch's own default is half an hour.
            set_waiting_time(group, wait)
        of_weights = {_axis(_lines(storage, dim)): device_mesh.get_group(dim) for dim in range(4)}

        levels: list[dist.ProcessGroup] = []
        if sizes.hierarchical_cp:
            nested = [hierarchical_groups(ranks, sizes.hierarchical_cp) for ranks in dense.get_ranks("cp")]
            for level in range(len(sizes.hierarchical_cp)):
                levels.append(group_of([ranks for groups in nested for ranks in groups[level]]))
        # A hybrid run exchanges keys over dp_cp, so dp_cp does not share a group with FSDP either.
        # Neither do the rows that travel to experts: FSDP gathers weights meanwhile.
        cp, dp_cp = group_of(dense.get_ranks("cp")), group_of(dense.get_ranks("dp-cp"))
        if sizes.ep > 1:
            group_of(expert.get_ranks("tp-ep"))
        assert dist.group.WORLD is not None
        for axis, group in (of_weights | {_axis([list(range(world))]): dist.group.WORLD}).items():
            made.setdefault(axis, group)

        ends = group_of(dense.get_ranks("pp")) if sizes.pp == 2 else None
        if sizes.pp > 2:
            # The ranks between the ends are in none of these groups.
            pairs = [[ranks[0], ranks[-1]] for ranks in dense.get_ranks("pp")]
            if only_own:
                pairs = [ranks for ranks in pairs if rank in ranks]
            held = [dist.new_group(ranks, timeout=wait) for ranks in pairs]
            ends = next((group for ranks, group in zip(pairs, held) if rank in ranks), None)
        groups = ProcessGroupCollection(
            tp=device_mesh.get_group("tp"),
            cp=cp,
            dp=group_of(dense.get_ranks("dp")),
            dp_cp=dp_cp,
            pp=group_of(dense.get_ranks("pp")),
            tp_cp=group_of(dense.get_ranks("tp-cp")),
            ep=group_of(expert.get_ranks("ep")),
            etp=group_of(expert.get_ranks("tp")),
            edp=group_of(expert.get_ranks("dp")),
            tp_ep=group_of(expert.get_ranks("tp-ep")),
            tp_pp=group_of(dense.get_ranks("tp-pp")),
            tp_dp=group_of(dense.get_ranks("tp-dp")),
            tp_dp_cp=group_of(dense.get_ranks("tp-dp-cp")),
            hcp=tuple(levels),
            ends=ends,
            tp_mesh=device_mesh["tp"],
        )
        storage = _grid(expert, ("pp", "dp", "ep", "tp"))
        storage = storage.reshape(sizes.pp, sizes.dp_replicate, edp // sizes.dp_replicate, sizes.ep, etp)
        copies, shards = _lines(storage, 1), _lines(storage, 2)
        expert_mesh = DeviceMesh.from_group(
            [
                groups.pp,
                of_weights.get(_axis(copies)) or group_of(copies),
                of_weights.get(_axis(shards)) or group_of(shards),
                groups.ep,
                groups.etp,
            ],
            device_type,
            storage.contiguous(),
            mesh_dim_names=("pp", "edp_replicate", "edp", "ep", "etp"),
        )
        groups = dataclasses.replace(groups, expert_mesh=expert_mesh["ep", "etp"])
        return cls(sizes, groups, device_mesh, expert_mesh, dense, expert)

    def __str__(self) -> str:
        return self.sizes.equation(dist.get_world_size())


#: An axis of a grid: the ranks of each of its groups.
Axis = frozenset[tuple[int, ...]]


def _axis(rank_lists: list[list[int]]) -> Axis:
    return frozenset(tuple(sorted(ranks)) for ranks in rank_lists)


def _grid(ranks: RankGenerator, axes: tuple[str, ...]) -> torch.Tensor:
    """The ranks of a grid as a tensor whose dims are ``axes``. Axes that are left out have size 1."""
    order = [axis for axis in ranks.order.split("-") if axis in axes]
    grid = torch.tensor(ranks.numbers).view([ranks.sizes[axis] for axis in reversed(order)])
    return grid.permute([len(order) - 1 - order.index(axis) for axis in axes])


def _lines(storage: torch.Tensor, dim: int) -> list[list[int]]:
    """The rank lists of one dim of a tensor of ranks."""
    return storage.movedim(dim, -1).reshape(-1, storage.shape[dim]).tolist()


#: The seconds in which the ranks of all machines must be started, unless ddp_timeout is longer.
START_S = 600.0


def init_distributed(device_type: str, timeout_s: float = 600.0, start_s: float = START_S) -> None:
    """Starts the default process group, if there is none, with NCCL for CUDA and gloo otherwise.

    Under a launcher the group has the launcher's ranks, otherwise this process alone. This is the only
    function that reads the launcher's environment variables (RANK, WORLD_SIZE, LOCAL_RANK).

    Args:
        timeout_s: seconds that an exchange waits for an answer (ddp_timeout).
        start_s: seconds in which the ranks of all machines have to be started; timeout_s, if that is longer.

    Raises:
        NotReached: machine 0 cannot be reached, or other ranks of the launcher did not start in time.
    """
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    loopback = loopback_interface()
    if loopback and (not launched or os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]):
        # All ranks are on this machine, so no other machine has to reach them.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if not launched:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    start = datetime.timedelta(seconds=max(start_s, timeout_s))
    try:
        store, rank, world = next(rendezvous("env://", timeout=start))
        if (
            "LONGSPAN_LAUNCHER" in os.environ
            or os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        ):
            # The launcher's store outlives a restart, and what the earlier ranks wrote must not be found again.
            # The agents of torchrun on several machines count restarts apart, so that they have no common number.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise NotReached(
            f"rank {os.environ['RANK']} found nobody at {where} within {start.total_seconds():g} s ({why}). Start "
            "machine 0, and look at --main-process-ip, --main-process-port and the firewall."
        ) from None
    names = [f"longspan/started/{other}" for other in range(world)]
    store.set(names[rank], "")
    try:
        # A rank may start much later than another rank, so this waits longer than an exchange.
        store.wait(names, start)
    except RuntimeError:
        late = [str(other) for other, name in enumerate(names) if not store.check([name])]
        raise NotReached(
            f"rank {rank}: rank {', '.join(late)} of {world} did not start within {start.total_seconds():g} s. Start the same "
            "command on every machine."
        ) from None
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def common_store() -> dist.Store:
    """The store through which the ranks of the default process group have found each other."""
    return dist.distributed_c10d._get_default_store()


def loopback_interface() -> str | None:
    """The name of the loopback interface, or None if it is neither ``lo`` nor ``lo0``."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def waiting_time() -> datetime.timedelta | None:
    """The time that an exchange of the default process group waits for other ranks.

    This is ddp_timeout, or the time with which the user's code started the group. It is None for a backend
    that never waits, such as the fake backend of a dry run.
    """
    group = dist.group.WORLD
    assert group is not None
    try:
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, RuntimeError):
        return None


def set_waiting_time(group: dist.ProcessGroup, wait: datetime.timedelta | None) -> None:
    """Sets the time that exchanges of a group wait for other ranks; None changes nothing."""
    if wait is None:
        return
    for device in group._device_types:
        group._get_backend(device)._set_default_timeout(wait)


def hold_waiting_time() -> None:
    """Sets the waiting time of every group of this process to that of the default group.

    Groups that torch makes itself, for example for FSDP, wait half an hour otherwise.
    """
    wait = waiting_time()
    for group in list(dist.distributed_c10d._world.pg_map):
        set_waiting_time(group, wait)


def close_distributed() -> None:
    """Ends the default process group, after a barrier, because gloo sometimes aborts without one."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
