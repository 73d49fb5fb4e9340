"""SoC, driver, nodes, clocks, heat and limits, each from the files that say them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rkvlmd.board import clocks, driver, memory, nodes, service, soc
from rkvlmd.board.finding import Finding, Needs
from rkvlmd.board.root import open_root
from rkvlmd.board.soc import SOCS
from tests.fakes.boards.maker import Board
from tests.fakes.boards.trees import RENDER, VIDEO, container, rk3562, rk3588, rocket, x86

NEED = Needs(frozenset({"rknn", "rkllm"}), board=True)
SPARE = Needs(frozenset(), board=True)
COMPATIBLE = "/sys/firmware/devicetree/base/compatible"


@pytest.mark.parametrize(
    ("strings", "name"),
    [
        (("radxa,rock-5b", "rockchip,rk3588"), "rk3588"),
        (("xunlong,orangepi-5", "rockchip,rk3588s-orangepi-5", "rockchip,rk3588"), "rk3588s"),
        (("radxa,rock-5a", "rockchip,rk3588s"), "rk3588s"),
        (("rockchip,rv1126b-evb", "rockchip,rv1126b"), "rv1126b"),
        (("pine64,rockpro64", "rockchip,rk3399"), None),
        (("raspberrypi,5-model-b", "brcm,bcm2712"), None),
        (("other,rk3588",), None),
        ((), None),
    ],
)
def test_the_device_tree_names_the_soc(strings: tuple[str, ...], name: str | None) -> None:
    found = soc.of_compatible(strings)
    assert (found.name if found else None) == name


def soc_line(board: Board, folder: Path, override: str = "", needs: Needs = NEED) -> Finding:
    root, _ = open_root(board.write(folder))
    reading = soc.read(root, override)
    return soc.finding(root, reading, Needs(needs.engines, soc.is_board(root, reading)))


def test_the_setting_comes_first(tmp_path: Path) -> None:
    line = soc_line(rk3588(), tmp_path / "a", "RK3588S")
    assert (line.status, line.facts["soc"]) == ("note", "rk3588s")
    line = soc_line(rk3588(), tmp_path / "b", "rk3576")
    assert (line.status, line.facts["soc"]) == ("warn", "rk3576")
    assert "the device tree says RK3588" in line.says
    line = soc_line(rk3588(), tmp_path / "c", "rk9999")
    assert (line.status, line.facts["soc"]) == ("stop", None)


def test_a_masked_device_tree_is_seen_by_the_libraries_too(tmp_path: Path) -> None:
    for name, override in (("a", ""), ("b", "rk3588")):
        line = soc_line(container(), tmp_path / name, override)
        assert (line.status, line.facts["soc"]) == ("stop", "rk3588")
        assert line.engines == ("rknn",)
        assert "systempaths=unconfined" in line.todo


def test_socs_without_rkllm_and_without_npu(tmp_path: Path) -> None:
    board = rk3588()
    board.files[COMPATIBLE] = "radxa,rock-3a\0rockchip,rk3568\0"
    line = soc_line(board, tmp_path / "a")
    assert (line.status, line.engines) == ("stop", ("rkllm",))
    assert soc_line(board, tmp_path / "b", needs=SPARE).status == "note"
    board.files[COMPATIBLE] = "pine64,rockpro64\0rockchip,rk3399\0"
    line = soc_line(board, tmp_path / "c", needs=SPARE)
    assert (line.status, line.facts["soc"]) == ("warn", None)


def test_no_board(tmp_path: Path) -> None:
    line = soc_line(x86(), tmp_path / "a", needs=Needs(frozenset({"onnx"}), board=False))
    assert (line.status, line.todo) == ("note", "")
    assert soc_line(x86(), tmp_path / "b").status == "stop"


# --- driver ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.9.8", "ok"), ("0.10.0", "ok"), ("1.0.0", "ok"), ("0.9.7", "warn"), ("0.8.2", "warn")],
)
def test_driver_version(tmp_path: Path, version: str, status: str) -> None:
    board = rk3588()
    board.files["/sys/module/rknpu/version"] = version + "\n"
    root, _ = open_root(board.write(tmp_path))
    found = driver.read(root)
    line = driver.finding(root, found, NEED)
    assert (line.status, line.facts["version"]) == (status, version)
    assert ("warn below" in line.says) == (version == "0.8.2")


def test_driver_version_from_debugfs(tmp_path: Path) -> None:
    board = rk3588().without("/sys/module/rknpu")
    root, _ = open_root(board.write(tmp_path))
    assert driver.read(root) == driver.Driver("rknpu", "0.9.8")


def test_a_driver_without_version_and_none(tmp_path: Path) -> None:
    board = rk3588().without("/sys/module/rknpu", "/sys/kernel/debug")
    root, _ = open_root(board.write(tmp_path / "a"))
    assert driver.finding(root, driver.read(root), NEED).status == "stop"
    board.files["/sys/module/rknpu/refcnt"] = "0"
    root, _ = open_root(board.write(tmp_path / "b"))
    assert driver.finding(root, driver.read(root), NEED).status == "note"


def test_rocket(tmp_path: Path) -> None:
    root, _ = open_root(rocket().write(tmp_path / "a"))
    line = driver.finding(root, driver.read(root), NEED)
    assert (line.status, line.facts["driver"]) == ("stop", "rocket")
    assert "DKMS" in line.todo
    board = rocket().without("/sys/module/rocket")  # built in
    root, _ = open_root(board.write(tmp_path / "b"))
    assert driver.read(root).name == "rocket"


def test_cores_that_the_driver_shows(tmp_path: Path) -> None:
    board = rk3588()
    root, _ = open_root(board.write(tmp_path / "a"))
    assert driver.core_finding(root, SOCS["rk3588"]).status == "ok"
    board.files["/sys/kernel/debug/rknpu/load"] = "NPU load:  Core0: 12%, Core1:  0%,\n"
    root, _ = open_root(board.write(tmp_path / "b"))
    assert driver.busy(root) == (12, 0)
    line = driver.core_finding(root, SOCS["rk3588"])
    assert (line.status, line.facts) == ("warn", {"cores": 3, "shown": 2})


def test_the_domain_rule(tmp_path: Path) -> None:
    root, _ = open_root(rk3588().write(tmp_path / "a"))
    line = driver.domain_finding(root, SOCS["rk3588"])
    assert (line.status, line.facts) == ("ok", {"base_domain": 1, "iommu": True})
    assert driver.domain_finding(root, SOCS["rk3562"]).facts["base_domain"] == 0
    board = rk3588().without("/sys/devices/platform/fdab0000.npu/iommu_group")
    root, _ = open_root(board.write(tmp_path / "b"))
    line = driver.domain_finding(root, SOCS["rk3588"])
    assert (line.status, line.facts["iommu"]) == ("note", False)


# --- nodes -------------------------------------------------------------------------------


def node_lines(board: Board, folder: Path) -> dict[str, Finding]:
    root, here = open_root(board.write(folder))
    found = nodes.findings(root, here, service.read(root, here), nodes.read(root), NEED)
    return {line.id: line for line in found}


def test_drm_nodes_are_those_of_the_npu(tmp_path: Path) -> None:
    lines = node_lines(rk3588(), tmp_path)
    assert {key: line.status for key, line in lines.items()} == {
        "nodes": "ok", "access": "ok", "access-daemon": "ok",
    }  # fmt: skip
    assert lines["nodes"].says == "/dev/dri/card1 (video), /dev/dri/renderD129 (render)"
    assert lines["nodes"].facts["nodes"][0]["mode"] == "0660"


def test_nodes_by_path_where_sysfs_does_not_tell(tmp_path: Path) -> None:
    board = rk3588()
    board.links = {k: v for k, v in board.links.items() if "/sys/class/drm" not in k}
    lines = node_lines(board, tmp_path)
    assert lines["nodes"].says == "/dev/dri/card1 (video), /dev/dri/renderD129 (render)"


def test_dma_heap_nodes(tmp_path: Path) -> None:
    lines = node_lines(rk3562(), tmp_path / "a")
    assert lines["nodes"].says == "/dev/rknpu (video), 2 in /dev/dma_heap"
    board = rk3562()
    board.node("/dev/dma_heap/system", 0, "0600")
    line = node_lines(board, tmp_path / "b")["access-daemon"]
    assert line.facts["closed"] == ["/dev/dma_heap/system"]
    assert "udev rule" in line.todo


def test_the_daemon_s_user_counts_more_than_the_one_who_asks(tmp_path: Path) -> None:
    board = rk3588()
    board.here["gids"] = [1000]
    board.files["/etc/group"] = f"video:x:{VIDEO}:rkvlmd\nrender:x:{RENDER}:\n"
    lines = node_lines(board, tmp_path)
    assert (lines["access"].status, lines["access"].engines) == ("note", ())
    assert lines["access-daemon"].status == "stop"
    assert lines["access-daemon"].facts["closed"] == ["/dev/dri/renderD129"]
    assert lines["access-daemon"].todo.startswith("sudo usermod -aG render rkvlmd")


def test_a_service_user_that_does_not_exist(tmp_path: Path) -> None:
    board = rk3588()
    board.files["/etc/passwd"] = "root:x:0:0::/root:/bin/sh\n"
    line = node_lines(board, tmp_path)["access-daemon"]
    assert line.status == "stop"
    assert "does not exist" in line.todo


def test_missing_and_fake_nodes(tmp_path: Path) -> None:
    lines = node_lines(container(), tmp_path)
    assert lines.keys() == {"nodes", "rknpu-link"}
    assert lines["nodes"].facts["missing"] == ["/dev/dri/card1", "/dev/dri/renderD129"]
    assert "--device /dev/dri/renderD129" in lines["nodes"].todo
    assert lines["rknpu-link"].todo == "remove /dev/rknpu"


def test_no_node_at_all(tmp_path: Path) -> None:
    board = rk3562()
    board.nodes.clear()
    assert node_lines(board, tmp_path)["nodes"].status == "stop"


# --- clocks, load, heat ------------------------------------------------------------------


def clock_lines(
    tmp_path: Path, change: Callable[[Board], object] = lambda board: None
) -> dict[str, Finding]:
    board = rk3588()
    change(board)
    root, _ = open_root(board.write(tmp_path))
    return {line.id: line for line in clocks.findings(root, SOCS["rk3588"], NEED)}


def put(path: str, text: str) -> Callable[[Board], object]:
    return lambda board: board.files.update({path: text})


def test_clocks_as_delivered(tmp_path: Path) -> None:
    lines = clock_lines(tmp_path)
    cpu = lines["clock-cpu"]
    assert (cpu.status, len(cpu.facts["policies"])) == ("warn", 2)  # the big CPUs alone
    assert cpu.says.startswith("CPU 4-7: ondemand, up to 2352 MHz")
    ddr = lines["clock-ddr"]
    assert ddr.status == "warn"
    assert ddr.facts == {"governor": "dmc_ondemand", "hz": 528_000_000, "max_hz": 2_112_000_000}
    assert lines["clock-npu"].status == "note"
    assert (lines["load"].status, lines["heat"].status) == ("ok", "ok")


def test_one_slow_cpu_group_is_enough(tmp_path: Path) -> None:
    change = put("/sys/devices/system/cpu/cpufreq/policy4/scaling_governor", "performance\n")
    line = clock_lines(tmp_path, change)["clock-cpu"]
    assert line.status == "warn"
    assert "ondemand, performance" in line.says


def test_a_fixed_but_low_memory_clock(tmp_path: Path) -> None:
    line = clock_lines(tmp_path, put("/sys/class/devfreq/dmc/governor", "userspace\n"))["clock-ddr"]
    assert line.status == "warn"


def test_max_freq_of_zero_is_no_limit(tmp_path: Path) -> None:
    path = "/sys/devices/platform/fdab0000.npu/devfreq/fdab0000.npu/max_freq"
    line = clock_lines(tmp_path, put(path, "0\n"))["clock-npu"]
    assert line.facts["max_hz"] == 1_000_000_000


def test_load_without_root(tmp_path: Path) -> None:
    def change(board: Board) -> None:
        board.without("/sys/kernel/debug")
        folder = "/sys/devices/platform/fdab0000.npu/devfreq/fdab0000.npu"
        board.files[f"{folder}/load"] = "99@1000000000Hz\n"

    line = clock_lines(tmp_path, change)["load"]
    assert (line.status, line.facts["percent"]) == ("note", [99])


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (put("/sys/class/thermal/thermal_zone0/temp", "75000\n"), "warn"),
        (put("/sys/class/thermal/thermal_zone0/trip_point_0_type", "critical\n"), "ok"),
    ],
)
def test_heat(tmp_path: Path, change: Callable[[Board], object], status: str) -> None:
    assert clock_lines(tmp_path, change)["heat"].status == status


def test_the_npu_s_zone_counts(tmp_path: Path) -> None:
    def change(board: Board) -> None:
        board.files["/sys/class/thermal/thermal_zone1/type"] = "soc-thermal\n"
        board.files["/sys/class/thermal/thermal_zone1/temp"] = "99000\n"

    assert clock_lines(tmp_path / "a", change)["heat"].facts["zone"] == "npu-thermal"
    root, _ = open_root(rocket().write(tmp_path / "b"))
    lines = {line.id: line for line in clocks.findings(root, SOCS["rk3588s"], NEED)}
    assert {"heat", "load"}.isdisjoint(lines)
    assert lines["clock-ddr"].status == lines["clock-npu"].status == "note"


# --- memory ------------------------------------------------------------------------------


def memory_lines(board: Board, folder: Path, needs: Needs = NEED) -> dict[str, Finding]:
    root, here = open_root(board.write(folder))
    found = memory.findings(root, memory.read(root), service.read(root, here), needs)
    return {line.id: line for line in found}


def test_memory_and_cma(tmp_path: Path) -> None:
    lines = memory_lines(container(), tmp_path / "a")
    assert lines["memory"].facts == {
        "total_bytes": 8_192_000_000, "available_bytes": 6_144_000_000,
        "limit_bytes": 4_000_000_000,
    }  # fmt: skip
    assert (lines["cma"].status, lines["cma"].facts["cma_bytes"]) == ("ok", 262_144 * 1024)
    board = rk3588()
    board.files["/proc/meminfo"] = "MemTotal: 10 kB\nCmaTotal: 1000 kB\nCmaFree: 50 kB\n"
    assert memory_lines(board, tmp_path / "b")["cma"].status == "note"


@pytest.mark.parametrize(
    ("unit", "limits", "status", "facts"),
    [
        ("LimitNOFILE=102400", "1024", "ok", {"shell": 1024, "service": 102400}),
        ("LimitNOFILE=524288", "1024", "ok", {"shell": 1024, "service": 524288}),
        ("LimitNOFILE=4096", "200000", "warn", {"shell": 200000, "service": 4096}),
        ("", "200000", "warn", {"shell": 200000, "service": 1024}),
        (None, "unlimited", "ok", {"shell": 1 << 30, "service": None}),
        (None, "1024", "warn", {"shell": 1024, "service": None}),
        (None, "nonsense", "note", {"shell": None, "service": None}),
    ],
)
def test_descriptors(
    tmp_path: Path, unit: str | None, limits: str, status: str, facts: dict[str, int]
) -> None:
    board = rk3588().without("/etc/systemd")
    if unit is not None:
        board.files["/etc/systemd/system/rkvlmd.service"] = f"[Service]\nUser=rkvlmd\n{unit}\n"
    board.files["/proc/self/limits"] = f"Max open files            {limits}       4096   files\n"
    line = memory_lines(board, tmp_path)["descriptors"]
    assert (line.status, line.facts) == (status, facts)


def test_descriptors_without_an_npu(tmp_path: Path) -> None:
    needs = Needs(frozenset({"onnx"}), board=False)
    assert memory_lines(x86(), tmp_path, needs)["descriptors"].status == "ok"
