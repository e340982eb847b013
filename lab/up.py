"""Making a lab: namespaces and wire, services, policies, endpoints, workloads; in this order.

    wire ─▶ identity ─▶ xds ─▶ agent ─▶ flows ─▶ policies ─▶ endpoints ─▶ hosts files
         ─▶ processes ─▶ ports

Every step is in the state file before the next begins, and a failed `up` unmakes what it made.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cilia.errors import Kind
from lab import host, process, state
from lab.clients import AgentClient, flows_watch, identity_answers, xds_answers
from lab.down import clear
from lab.errors import LabError, LabExists
from lab.names import Names, netns_path
from lab.spec import LabSpec, NodeSpec, WorkloadSpec
from lab.state import LabState, NodeState, WorkloadState

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "bpf"

# The underlay: RFC 2544's benchmark range and a unique local prefix, with the world as the router.
# The world also owns addresses of documentation ranges (RFC 5737, RFC 3849) that are on no wire.
UNDERLAY4 = "198.18.0"
UNDERLAY6 = "fd00:18:"
WORLD4 = f"{UNDERLAY4}.100"
WORLD6 = f"{UNDERLAY6}:100"
FAR4 = "192.0.2.10"
FAR6 = "2001:db8::10"
WORLD_PORT = 80

READY_TIMEOUT_S = 40.0
PORT_TIMEOUT_S = 15.0
POLL_S = 0.03

_CALLED = {"identity": "identity", "xds": "xDS", "flows": "flow"}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Command lines of a node's services."""

    identity: tuple[str, ...]
    xds: tuple[str, ...]
    agent: tuple[str, ...]
    flows: tuple[str, ...]


def services(spec: LabSpec, node: NodeSpec, names: Names) -> Services:
    """How the services of a node are started."""
    run_dir, state_dir = names.run_dir(node.name), names.state_dir(node.name)
    common = ("--run-dir", str(run_dir), "--state-dir", str(state_dir))
    return Services(
        identity=(sys.executable, "-m", "services.identity", *common, *node.identity_args),
        xds=(
            sys.executable, "-m", "services.xds",
            "--run-dir", str(run_dir),
            "--secrets", str(run_dir / "certs"),
            *node.xds_args,
        ),
        flows=(
            sys.executable, "-m", "services.flows", *common,
            "--node", node.name,
            *node.flows_args,
        ),
        agent=(
            sys.executable, "-m", "services.agent", *common,
            "--node-name", node.name,
            "--bpffs", str(run_dir / "bpf"),
            "--object-dir", str(OBJECTS),
            "--ipv4-pool", spec.pool4,
            "--ipv6-pool", spec.pool6,
            "--enable-policy", spec.enforcement,
            *node.agent_args,
        ),
    )  # fmt: skip


def environment(extra: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """For services and workloads: our Python first, our packages importable, no byte code left."""
    # The test session marks what it starts, and looks for leftovers by that mark.
    wanted = ("LANG", "TERM", "HOME", "CILIA_TEST_SESSION")
    keep = {key: os.environ[key] for key in wanted if key in os.environ}
    path = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    return {
        **keep,
        "PATH": f"{Path(sys.executable).parent}:{path}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        **dict(extra),
    }


def check_machine() -> None:
    """Raises LabError when a lab cannot be made here, with what is missing."""
    if os.geteuid() != 0:
        raise LabError(
            "a lab needs root",
            cure="Run it as root: it makes namespaces and loads programs.",
            kind=Kind.DENIED,
        )
    if not (OBJECTS / "bpf_lxc.o").is_file():
        raise LabError(f"no compiled programs in {OBJECTS}", cure="Run `make bpf`.")


def up(spec: LabSpec, *, say: Say, keep_failed: bool = False) -> LabState:
    """Make the lab and return when all of it answers. Raises LabError; then nothing is left."""
    check_machine()
    with state.locked(spec.name):
        known = state.read(spec.name)
        if known is not None and known.ready and known.boot_id == state.boot_id():
            raise LabExists(
                f"lab {spec.name!r} is up already",
                cure=f"See `cilia lab status {spec.name}`, or `cilia lab down {spec.name}` first.",
            )
        if clear(spec.name, keep_dir=True).anything:
            say("removed the remains of an earlier run")
        try:
            return asyncio.run(_up(spec, say))
        except BaseException as error:
            if not keep_failed:
                if isinstance(error, KeyboardInterrupt):
                    say(f"interrupted: removing what there is of lab {spec.name}")
                clear(spec.name)
            raise


async def _up(spec: LabSpec, say: Say) -> LabState:
    names = Names(spec.name)
    lab = _ground(spec, names)
    say(f"network: {lab.nodes[0].netns} and {lab.world_netns}, joined by {names.wire}")
    for node in spec.nodes:
        lab = await _start_services(spec, node, names, lab, say)
    async with AgentClient(lab.nodes[0].agent_socket) as agent:
        if spec.policies:
            revision = await agent.apply(spec.policies)
            say(f"policies: {len(spec.policies)} files enforced, revision {revision}")
        lab = await _add_endpoints(spec, names, lab, agent)
    say(f"endpoints: {len(lab.workloads)} with policy in force")
    _write_hosts(names, lab)
    lab = await _start_workloads(spec, names, lab)
    lab = dataclasses.replace(lab, ready=True)
    state.write(lab)
    return lab


def _ground(spec: LabSpec, names: Names) -> LabState:
    """Directories, cgroups, namespaces, links and mounts."""
    for path in (names.dir, names.etc, names.log):
        path.mkdir(parents=True, exist_ok=True)
    cgroup = host.lab_cgroup(spec.name)
    nodes: list[NodeState] = []
    for index, node in enumerate(spec.nodes):
        run_dir = names.run_dir(node.name)
        run_dir.mkdir(exist_ok=True)
        names.state_dir(node.name).mkdir(exist_ok=True)
        node_cgroup = None
        if cgroup is not None:
            node_cgroup = cgroup / node.name
            node_cgroup.mkdir(parents=True, exist_ok=True)
        nodes.append(
            NodeState(
                name=node.name,
                netns=names.node(node.name),
                run_dir=str(run_dir),
                bpffs=str(run_dir / "bpf"),
                cgroup=None if node_cgroup is None else str(node_cgroup),
                ipv4=f"{UNDERLAY4}.{index + 1}",
                ipv6=f"{UNDERLAY6}:{index + 1:x}",
            )
        )
    if cgroup is not None:
        (cgroup / "world").mkdir(parents=True, exist_ok=True)
    lab = LabState(
        name=spec.name,
        source=spec.source,
        boot_id=state.boot_id(),
        world_netns=names.world,
        world_ipv4=WORLD4,
        world_ipv6=WORLD6,
        nodes=tuple(nodes),
    )
    state.write(lab)
    host.add_netns([names.wire, names.world, *(node.netns for node in nodes)])
    _wire(names, nodes)
    for node_state in nodes:
        host.mount_bpffs(Path(node_state.bpffs))
    return lab


def _wire(names: Names, nodes: Sequence[NodeState]) -> None:
    wire, world = names.wire, names.world
    commands = [
        # Duplicate address detection would keep the IPv6 addresses tentative for a second.
        f"-n {wire} link add br0 type bridge",
        f"-n {wire} link set br0 up",
        f"link add eth0 netns {world} type veth peer name world netns {wire}",
        f"-n {wire} link set world master br0 up",
        f"-n {world} link set eth0 up",
        f"-n {world} addr add {WORLD4}/24 dev eth0",
        f"-n {world} addr add {WORLD6}/64 dev eth0 nodad",
        f"-n {world} addr add {FAR4}/32 dev lo",
        f"-n {world} addr add {FAR6}/128 dev lo nodad",
    ]
    for index, node in enumerate(nodes):
        commands += [
            f"link add eth0 netns {node.netns} type veth peer name n{index} netns {wire}",
            f"-n {wire} link set n{index} master br0 up",
            f"-n {node.netns} link set eth0 up",
            f"-n {node.netns} addr add {node.ipv4}/24 dev eth0",
            f"-n {node.netns} addr add {node.ipv6}/64 dev eth0 nodad",
            f"-n {node.netns} route add default via {WORLD4}",
            f"-n {node.netns} -6 route add default via {WORLD6}",
        ]
    for command in commands:
        host.run(["ip", *command.split()])


async def _start_services(
    spec: LabSpec, node: NodeSpec, names: Names, lab: LabState, say: Say
) -> LabState:
    argv = services(spec, node, names)
    lab = _with_node(
        lab,
        node.name,
        identity_argv=argv.identity,
        xds_argv=argv.xds if node.xds else (),
        flows_argv=argv.flows if node.flows else (),
        agent_argv=argv.agent,
    )
    item = lab.node(node.name)
    lab = await _start(lab, node.name, "identity", partial(identity_answers, item.identity_socket))
    if node.xds:
        lab = await _start(lab, node.name, "xds", partial(xds_answers, item.xds_socket))
    lab = start_service(lab, node.name, "agent")
    await agent_ready(lab, node.name)
    if node.flows:
        lab = await _start(
            lab,
            node.name,
            "flows",
            partial(flows_watch, item.flows_socket),
            last="it does not hear the agent",
        )
    started = ["identity", *(["xds"] if node.xds else []), "agent"]
    started += ["flows"] if node.flows else []
    say(f"{node.name}: {', '.join(started[:-1])} and {started[-1]} answer")
    return lab


async def _start(
    lab: LabState,
    node: str,
    service: str,
    ready: Callable[[], Awaitable[bool]],
    *,
    last: str = "no answer",
) -> LabState:
    """Start a service and wait until it is ready; `last` says what was missing when it never is."""
    lab = start_service(lab, node, service)
    item = lab.node(node)
    started = {"identity": item.identity, "xds": item.xds, "flows": item.flows}[service]
    assert started is not None
    await _until(
        ready,
        what=f"the {_CALLED[service]} service",
        last=lambda: last,
        process_=started,
        log=Names(lab.name).log / f"{node}-{service}.log",
    )
    return lab


async def agent_ready(lab: LabState, node: str) -> None:
    """Wait until a node's agent is Ok. Raises LabError with the end of its log."""
    item = lab.node(node)
    assert item.agent is not None
    last = "no answer yet"
    async with AgentClient(item.agent_socket) as client:

        async def ready() -> bool:
            nonlocal last
            status = await client.status()
            if status is not None:
                last = f"{status.state}: {status.message}"
            return status is not None and status.ok

        await _until(
            ready,
            what=f"the agent of {node}",
            last=lambda: last,
            process_=item.agent,
            log=Names(lab.name).log / f"{node}-agent.log",
        )


def start_service(lab: LabState, node: str, service: str) -> LabState:
    """Start one of a node's services and record it; the state file is written before
    it runs anything that matters: its cgroup knows it from the first instruction."""
    item = lab.node(node)
    argv = {
        "agent": item.agent_argv,
        "identity": item.identity_argv,
        "xds": item.xds_argv,
        "flows": item.flows_argv,
    }[service]
    started = process.spawn(
        f"{node}-{service}",
        argv,
        # Entered by setns: `ip netns exec` would replace /sys, and with it cgroup2 and bpffs.
        place=process.Place(
            netns=netns_path(item.netns), cgroup=Path(item.cgroup) if item.cgroup else None
        ),
        env=environment(),
        log=Names(lab.name).log / f"{node}-{service}.log",
    )
    lab = _with_node(lab, node, **{service: started})
    state.write(lab)
    return lab


def _with_node(lab: LabState, name: str, **changes: object) -> LabState:
    nodes = tuple(
        dataclasses.replace(n, **changes) if n.name == name else n  # type: ignore[arg-type]  # by field name
        for n in lab.nodes
    )
    return dataclasses.replace(lab, nodes=nodes)


async def _until(
    ready: Callable[[], Awaitable[bool]],
    *,
    what: str,
    last: Callable[[], str],
    process_: process.Process,
    log: Path,
) -> None:
    """Poll a check until it holds. Raises LabError when the process dies or takes too long."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not await ready():
                process.reap()
                if not process.alive(process_):
                    raise LabError(f"{what} ended at once; the end of {log}:\n{process.tail(log)}")
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise LabError(
            f"{what} is not ready after {READY_TIMEOUT_S:g} s ({last()}); the end of {log}:\n"
            + process.tail(log)
        ) from error


async def _add_endpoints(
    spec: LabSpec, names: Names, lab: LabState, agent: AgentClient
) -> LabState:
    workloads = [
        WorkloadState(
            name=w.name,
            group=w.group,
            namespace=w.namespace,
            node=w.node,
            netns=names.pod(w.namespace, w.name),
            labels=w.labels,
        )
        for w in spec.workloads
    ]
    lab = dataclasses.replace(lab, workloads=tuple(workloads))
    state.write(lab)
    host.add_netns([w.netns for w in workloads])

    async def add(index: int, item: WorkloadState) -> None:
        added = await agent.add(
            name=item.name,
            namespace=item.namespace,
            labels=item.labels,
            netns=str(netns_path(item.netns)),
            annotations=dict(spec.workloads[index].annotations),
        )
        workloads[index] = dataclasses.replace(
            item,
            endpoint_id=added.id,
            identity=added.identity,
            ipv4=added.ipv4,
            ipv6=added.ipv6,
        )

    try:
        async with asyncio.TaskGroup() as group:
            for index, item in enumerate(list(workloads)):
                group.create_task(add(index, item))
    except* LabError as errors:
        raise LabError("; ".join(str(e) for e in errors.exceptions)) from errors
    lab = dataclasses.replace(lab, workloads=tuple(workloads))
    state.write(lab)
    return lab


def hosts_text(lab: LabState, namespace: str) -> str:
    """The hosts file of a namespace: own workloads by name and group, all by name.namespace."""
    lines = [
        "127.0.0.1 localhost",
        "::1 localhost ip6-localhost ip6-loopback",
        f"{lab.world_ipv4} world",
        f"{lab.world_ipv6} world",
    ]
    lines += [f"{address} {n.name}" for n in lab.nodes for address in (n.ipv4, n.ipv6)]
    for w in lab.workloads:
        words = [f"{w.name}.{w.namespace}"]
        if w.group != w.name:
            words.append(f"{w.group}.{w.namespace}")
        if w.namespace == namespace:
            words += [w.name] if w.group == w.name else [w.name, w.group]
        lines += [f"{a} {' '.join(words)}" for a in (w.ipv4, w.ipv6) if a]
    return "\n".join(lines) + "\n"


def _write_hosts(names: Names, lab: LabState) -> None:
    (names.etc / "resolv.conf").write_text(
        "# Names inside the lab come from /etc/hosts; there is no resolver.\n"
    )
    for namespace in {"default", *(w.namespace for w in lab.workloads)}:
        names.hosts(namespace).write_text(hosts_text(lab, namespace))


def place_of(lab: LabState, item: WorkloadState) -> process.Place:
    """Where a workload's processes run."""
    names = Names(lab.name)
    cgroup = lab.node(item.node).cgroup
    return process.Place(
        netns=netns_path(item.netns),
        cgroup=Path(cgroup) if cgroup else None,
        hosts=names.hosts(item.namespace),
        resolv=names.etc / "resolv.conf",
    )


def world_place(lab: LabState) -> process.Place:
    """Where the world's processes run."""
    names = Names(lab.name)
    cgroup = host.lab_cgroup(lab.name)
    return process.Place(
        netns=netns_path(lab.world_netns),
        cgroup=None if cgroup is None else cgroup / "world",
        hosts=names.hosts("default"),
        resolv=names.etc / "resolv.conf",
    )


async def _start_workloads(spec: LabSpec, names: Names, lab: LabState) -> LabState:
    world = process.spawn(
        "world",
        [sys.executable, "-m", "lab.httpd", "--name", "world", "--port", str(WORLD_PORT)],
        place=world_place(lab),
        env=environment(),
        log=names.log / "world.log",
    )
    lab = dataclasses.replace(lab, world_process=world)
    state.write(lab)
    workloads = list(lab.workloads)
    wanted: list[tuple[process.Process, str, tuple[int, ...], Path]] = [
        (world, "world", (WORLD_PORT,), names.log / "world.log")
    ]
    for index, (w, item) in enumerate(zip(spec.workloads, lab.workloads, strict=True)):
        if not w.command:
            continue
        log = names.log / f"{item.namespace}.{item.name}.log"
        started = _start_workload(w, item, lab, log)
        workloads[index] = dataclasses.replace(item, process=started)
        lab = dataclasses.replace(lab, workloads=tuple(workloads))
        state.write(lab)
        wanted.append((started, item.full_name, w.ports, log))
    for started, name, ports, log in wanted:
        await _listening(started, name, ports, log)
    return lab


def _start_workload(
    spec: WorkloadSpec, item: WorkloadState, lab: LabState, log: Path
) -> process.Process:
    return process.spawn(
        item.full_name,
        spec.command,
        place=place_of(lab, item),
        env=environment([("CILIA_LAB_WORKLOAD", item.full_name), *spec.env]),
        log=log,
    )


async def _listening(
    started: process.Process, name: str, ports: tuple[int, ...], log: Path
) -> None:
    """Wait until the ports listen. Raises LabError when the process dies or takes too long."""
    try:
        async with asyncio.timeout(PORT_TIMEOUT_S):
            for port in ports:
                while not host.listens(started.pid, port):
                    process.reap()
                    if not process.alive(started):
                        raise LabError(
                            f"{name} ended before it listened on {port}:\n{process.tail(log)}"
                        )
                    await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise LabError(
            f"{name} does not listen on its ports {list(ports)} after {PORT_TIMEOUT_S:g} s:\n"
            f"{process.tail(log)}"
        ) from error
