"""The device nodes of the NPU: which they are, whose, and who may open them."""

from __future__ import annotations

from dataclasses import dataclass

from rkvlmd.board.finding import Finding, Needs, Status
from rkvlmd.board.root import Here, Node, Root
from rkvlmd.board.service import Person, Service, group_name

_NPU = ("rknn", "rkllm")
_LEGACY = "/dev/rknpu"
_HEAPS = "/dev/dma_heap"


@dataclass(frozen=True, slots=True)
class Nodes:
    """``found``: the nodes that must open; ``missing``: those that the kernel has and /dev not."""

    found: tuple[Node, ...]
    missing: tuple[str, ...]
    heaps: tuple[Node, ...]
    fake: bool


def read(root: Root) -> Nodes:
    """Return the nodes of the driver.

    Fact sheet 5.3: built with DRM GEM it has a card and a render node, whose
    numbers vary; built with DMA-HEAP it has ``/dev/rknpu`` and uses the heaps.
    """
    wanted = [
        f"/dev/dri/{name}"
        for name in root.names("/sys/class/drm")
        if "DRIVER=RKNPU" in (root.text(f"/sys/class/drm/{name}/device/uevent") or "")
        and name.removeprefix("renderD").removeprefix("card").isdecimal()
    ]
    links = [f"/dev/dri/by-path/{n}" for n in root.names("/dev/dri/by-path") if ".npu-" in n]
    targets = [target for link in links if (target := root.link(link))]
    wanted += ["/dev/dri/" + target.rpartition("/")[2] for target in targets]
    wanted = sorted(set(wanted))
    legacy = root.node(_LEGACY)
    fake = root.link(_LEGACY) is not None or (legacy is not None and not legacy.device)
    if legacy is not None and not fake and not wanted:
        wanted = [_LEGACY]
    nodes = {path: root.node(path) for path in wanted}
    heaps = [root.node(f"{_HEAPS}/{name}") for name in root.names(_HEAPS)]
    return Nodes(
        found=tuple(n for n in nodes.values() if n is not None and n.device),
        missing=tuple(path for path, n in nodes.items() if n is None or not n.device),
        heaps=tuple(heap for heap in heaps if heap is not None and heap.device),
        fake=fake,
    )


def findings(root: Root, here: Here, service: Service, nodes: Nodes, needs: Needs) -> list[Finding]:
    """Return the lines about nodes and who may open them."""
    found = [_nodes(root, nodes, needs)]
    if nodes.fake:
        # Fact sheet 5.3: with a link of that name the runtime takes the old way in and fails.
        says = f"{_LEGACY} is a link or a file, not the driver's node; the libraries fail on it"
        todo = f"remove {_LEGACY}"
        found.append(Finding("rknpu-link", needs.lacking(*_NPU), "fake node", says, todo, _NPU))
    must = [*nodes.found]
    if any(node.path == _LEGACY for node in must):
        must += nodes.heaps
    if not must:
        return found
    me = Person(here.user, here.uid, here.gids)
    others = service.daemon.uid != here.uid
    mine = [node for node in must if not root.opens(node, here)]
    # Who asks is not always who serves; then a closed node only keeps them from trying by hand.
    status: Status = "note" if others else needs.lacking(*_NPU)
    found.append(_access(root, "access", me, mine, status, () if others else _NPU))
    if others:
        daemon = service.daemon
        theirs = [node for node in must if not node.opens_for(daemon.uid, daemon.gids)]
        closed = needs.lacking(*_NPU)
        found.append(_access(root, "access-daemon", daemon, theirs, closed, _NPU))
    return found


def _nodes(root: Root, nodes: Nodes, needs: Needs) -> Finding:
    listed = [_fact(root, node) for node in (*nodes.found, *nodes.heaps)]
    facts = {"nodes": listed, "missing": list(nodes.missing)}
    if nodes.missing:
        says = f"{', '.join(nodes.missing)}: the driver has it, /dev has not"
        todo = "in a container, pass " + " ".join(f"--device {path}" for path in nodes.missing)
        return Finding("nodes", needs.lacking(*_NPU), "device nodes", says, todo, _NPU, facts)
    if not nodes.found:
        says = "none of the NPU: neither a DRM node with the driver RKNPU nor /dev/rknpu"
        todo = "in a container, pass the host's nodes with --device; else see the NPU driver"
        return Finding("nodes", needs.lacking(*_NPU), "device nodes", says, todo, _NPU, facts)
    shown = [f"{node.path} ({group_name(root, node.gid)})" for node in nodes.found]
    if nodes.heaps:
        shown.append(f"{len(nodes.heaps)} in {_HEAPS}")
    return Finding("nodes", "ok", "device nodes", ", ".join(shown), facts=facts)


def _access(
    root: Root,
    key: str,
    who: Person,
    closed: list[Node],
    status: Status,
    engines: tuple[str, ...],
) -> Finding:
    facts = {"user": who.name, "closed": [node.path for node in closed]}
    what = f"access of {who.name}"
    if not closed:
        return Finding(key, "ok", what, "may open them", facts=facts)
    groups = sorted({group_name(root, node.gid) for node in closed if node.mode & 0o060 == 0o060})
    says = f"may not open {', '.join(node.path for node in closed)}"
    # Fact sheet 5.3: users need the group of both the card and the render node.
    if who.uid < 0:
        todo = f"the user {who.name} does not exist; install systemd/sysusers.d/rkvlmd.conf"
    elif groups and groups != ["root"]:
        todo = f"sudo usermod -aG {','.join(groups)} {who.name}, then log in again or restart"
    else:
        todo = "a udev rule must give the nodes to the group render"
    return Finding(key, status, what, says, todo, engines, facts)


def _fact(root: Root, node: Node) -> dict[str, str]:
    return {
        "path": node.path,
        "mode": f"{node.mode:04o}",
        "group": group_name(root, node.gid),
        "owner": str(node.uid),
    }
