"""Seven machines: five boards, a container on a board, and a PC."""

from __future__ import annotations

from tests.fakes.boards.maker import MODELS, X86_64, Board, onnx_files, rkllm, rknn, rknnrt

_CPU = "/sys/devices/system/cpu"
_UNIT = "/etc/systemd/system/rkvlmd.service"
VIDEO, RENDER = 44, 105
_GROUPS = f"root:x:0:\nvideo:x:{VIDEO}:rkvlmd\nrender:x:{RENDER}:rkvlmd\nuser:x:1000:\n"


def _board(compatible: str, kernel: str, *, python: tuple[int, int] = (3, 11)) -> Board:
    """Return what every machine has."""
    folder = f"/opt/rkvlmd/lib/python{python[0]}.{python[1]}/site-packages"
    board = Board(
        here={
            "user": "user", "uid": 1000, "gids": [1000, VIDEO, RENDER], "machine": "aarch64",
            "python": list(python), "folders": [folder], "library_path": [],
        }
    )  # fmt: skip
    if compatible:
        board.links["/proc/device-tree"] = "/sys/firmware/devicetree/base"
        board.files["/sys/firmware/devicetree/base/compatible"] = compatible
    board.files |= {
        "/proc/sys/kernel/osrelease": f"{kernel}\n",
        "/proc/self/limits": "Limit                     Soft Limit           Hard Limit   Units\n"
        "Max open files            1024                 1048576              files\n",
        "/etc/passwd": "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"
        "rkvlmd:x:990:990::/var/lib/rkvlmd:/usr/sbin/nologin\n",
        "/etc/group": _GROUPS,
        f"{folder}/onnxruntime-1.20.1.dist-info/METADATA": "",
        f"{folder}/rknn_toolkit_lite2-2.3.2.dist-info/METADATA": "",
        f"{folder}/pkg_resources/__init__.py": "",
    }
    _memory(board, 8_000_000, 6_000_000)
    return board


def _memory(board: Board, total: int, available: int) -> None:
    """Give it memory, kB."""
    board.files["/proc/meminfo"] = (
        f"MemTotal:       {total} kB\nMemFree:         100000 kB\nMemAvailable:   {available} kB\n"
        "CmaTotal:         262144 kB\nCmaFree:          240000 kB\n"
    )


def _driver(board: Board, version: str, node: str, soc: str, cores: int) -> None:
    """Give it the vendor's driver with its DRM nodes and its clock."""
    device = f"/sys/devices/platform/{node}"
    load = ", ".join(f"Core{i}:  0%" for i in range(cores)) + "," if cores > 1 else " 0%"
    board.files |= {
        "/sys/module/rknpu/version": f"{version}\n",
        "/sys/kernel/debug/rknpu/version": f"RKNPU driver: v{version}\n",
        "/sys/kernel/debug/rknpu/load": f"NPU load:  {load}\n",
        f"{device}/uevent": f"DRIVER=RKNPU\nOF_NAME=npu\nOF_COMPATIBLE_0=rockchip,{soc}-rknpu\n",
        f"{device}/iommu_group/name": "\n",
        f"{device}/devfreq/{node}/governor": "rknpu_ondemand\n",
        f"{device}/devfreq/{node}/cur_freq": "1000000000\n",
        f"{device}/devfreq/{node}/max_freq": "1000000000\n",
        f"{device}/devfreq/{node}/available_frequencies": "300000000 1000000000\n",
        f"{device}/devfreq/{node}/load": "0@1000000000Hz\n",
    }
    board.links |= {
        f"/sys/class/devfreq/{node}": f"../../devices/platform/{node}/devfreq/{node}",
        f"/sys/bus/platform/devices/{node}": f"../../../devices/platform/{node}",
    }


def _drm(board: Board, node: str) -> None:
    """Give it the display's card and the NPU's card and render node."""
    board.files["/sys/class/drm/card0/device/uevent"] = "DRIVER=rockchip-drm\n"
    for name in ("card1", "renderD129"):
        board.links[f"/sys/class/drm/{name}/device"] = f"/sys/devices/platform/{node}"
    board.node("/dev/dri/card0", VIDEO)
    board.node("/dev/dri/card1", VIDEO)
    board.node("/dev/dri/renderD129", RENDER)
    board.links["/dev/dri/by-path/platform-" + node + "-card"] = "../card1"
    board.links["/dev/dri/by-path/platform-" + node + "-render"] = "../renderD129"


def _cpus(board: Board, governor: str, *groups: tuple[int, int, int]) -> None:
    """Give it groups of CPUs: first, last, highest clock in kHz."""
    board.files[f"{_CPU}/present"] = f"0-{groups[-1][1]}\n"
    for first, last, most in groups:
        folder = f"{_CPU}/cpufreq/policy{first}"
        board.files |= {
            f"{folder}/related_cpus": " ".join(map(str, range(first, last + 1))) + "\n",
            f"{folder}/scaling_governor": f"{governor}\n",
            f"{folder}/scaling_cur_freq": f"{most}\n",
            f"{folder}/scaling_max_freq": f"{most}\n",
        }


def _dmc(board: Board, governor: str, now: int, most: int) -> None:
    board.files |= {
        "/sys/class/devfreq/dmc/governor": f"{governor}\n",
        "/sys/class/devfreq/dmc/cur_freq": f"{now}\n",
        "/sys/class/devfreq/dmc/max_freq": f"{most}\n",
    }


def _heat(board: Board, name: str, millidegrees: int, passive: int) -> None:
    folder = "/sys/class/thermal/thermal_zone0"
    board.files |= {
        f"{folder}/type": f"{name}\n",
        f"{folder}/temp": f"{millidegrees}\n",
        f"{folder}/trip_point_0_type": "passive\n",
        f"{folder}/trip_point_0_temp": f"{passive}\n",
    }


def rk3588() -> Board:
    """Return a ROCK 5B as it should be: service, libraries, one model; clocks as delivered."""
    board = _board("radxa,rock-5b\0rockchip,rk3588\0", "6.1.84-8-rk2410")
    _driver(board, "0.9.8", "fdab0000.npu", "rk3588", 3)
    _drm(board, "fdab0000.npu")
    _cpus(board, "ondemand", (0, 3, 1_800_000), (4, 5, 2_352_000), (6, 7, 2_352_000))
    _dmc(board, "dmc_ondemand", 528_000_000, 2_112_000_000)
    _heat(board, "npu-thermal", 46_230, 75_000)
    board.files |= {
        "/usr/lib/librkllmrt.so": rkllm("1.3.0"),
        "/usr/lib/librknnrt.so": rknnrt("2.3.2"),
        _UNIT: "[Service]\nUser=rkvlmd\nLimitNOFILE=102400\n",
    }
    board.links["/lib"] = "usr/lib"
    board.model(
        "qwen3-vl-2b", outputs=4, npu_cores=3, iommu_domain=1, cpu_mask=0xF0,
        runtime_versions=["1.3"],
    )  # fmt: skip
    return board


def rk3588s() -> Board:
    """Return an Orange Pi 5 as often met: old kernel and driver, new Python, no groups."""
    board = _board(
        "xunlong,orangepi-5\0rockchip,rk3588s-orangepi-5\0rockchip,rk3588\0",
        "5.10.110-rockchip-rk3588",
        python=(3, 13),
    )
    _driver(board, "0.9.2", "fdab0000.npu", "rk3588", 3)
    _drm(board, "fdab0000.npu")
    _cpus(board, "performance", (0, 3, 1_800_000), (4, 7, 2_352_000))
    _dmc(board, "performance", 2_112_000_000, 2_112_000_000)
    board.without("/opt/rkvlmd/lib/python3.13/site-packages/rknn_toolkit")
    board.here["gids"] = [1000]
    board.files |= {
        "/etc/passwd": "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        "/usr/lib/librkllmrt.so": rkllm("1.2.3", needed=["libomp.so"]),
        "/usr/local/lib/librkllmrt.so": rkllm("1.1.4"),
        "/usr/lib/aarch64-linux-gnu/librknnrt.so": rknnrt("2.3.0"),
    }
    board.model("qwen2-vl-2b")
    return board


def rk3576() -> Board:
    """Return a ROCK 4D, hot and at work, with models that were made for other boards."""
    board = _board("radxa,rock-4d\0rockchip,rk3576\0", "6.1.84-rk3576")
    _driver(board, "0.9.8", "27700000.npu", "rk3576", 2)
    _drm(board, "27700000.npu")
    _cpus(board, "performance", (0, 3, 2_208_000), (4, 7, 2_304_000))
    _dmc(board, "userspace", 2_112_000_000, 2_112_000_000)
    _heat(board, "npu-thermal", 88_000, 85_000)
    board.files |= {
        "/sys/kernel/debug/rknpu/load": "NPU load:  Core0: 37%, Core1:  0%,\n",
        "/usr/lib/librkllmrt.so": rkllm("1.3.1"),
        "/usr/lib/librknnrt.so": rknnrt("2.3.2"),
        _UNIT: "[Service]\nUser=rkvlmd\n",
        "/etc/systemd/system/rkvlmd.service.d/limits.conf": "[Service]\nLimitNOFILE=4096\n",
    }
    board.model("for-rk3588", npu_cores=3)
    board.model(
        "by-newer-toolkit",
        encoder=rknn("rk3576", "2.5.0"),
        decoder="model_w4a16_rk3576.rkllm",
    )
    return board


def rk3562() -> Board:
    """Return a small board whose driver uses DMA heaps, with a 32-bit library."""
    board = _board("rockchip,rk3562-evb2\0rockchip,rk3562\0", "5.10.209")
    _driver(board, "0.9.8", "ff300000.npu", "rk3562", 1)
    _cpus(board, "schedutil", (0, 3, 2_016_000))
    _memory(board, 2_000_000, 1_200_000)
    board.node("/dev/rknpu", VIDEO)
    board.node("/dev/dma_heap/system", VIDEO)
    board.node("/dev/dma_heap/cma", VIDEO)
    board.files |= {
        "/usr/lib/librkllmrt.so": rkllm("1.3.0", machine=40),
        "/usr/lib/librknnrt.so": rknnrt("2.3.2"),
    }
    board.model("qwen3-0.6b", encoder=None, decoder="qwen3_w8a8_rk3562.rkllm", npu_cores=1)
    return board


def rocket() -> Board:
    """Return a board under a mainline kernel, whose driver the libraries cannot use."""
    board = _board("radxa,rock-5a\0rockchip,rk3588s\0", "6.18.2")
    _cpus(board, "schedutil", (0, 3, 1_800_000), (4, 7, 2_400_000))
    for index, address in enumerate(("fdab0000", "fdac0000", "fdad0000")):
        device = f"/sys/devices/platform/{address}.npu"
        board.files[f"{device}/uevent"] = (
            "DRIVER=rocket\nOF_COMPATIBLE_0=rockchip,rk3588-rknn-core\n"
        )
        board.links[f"/sys/class/accel/accel{index}/device"] = device
        board.node(f"/dev/accel/accel{index}", RENDER)
    board.files["/sys/module/rocket/refcnt"] = "0\n"
    board.files |= {
        "/usr/lib/librkllmrt.so": rkllm("1.3.0"),
        "/usr/lib/librknnrt.so": rknnrt("2.3.2"),
    }
    board.model("qwen3-vl-2b")
    return board


def container() -> Board:
    """Return a container on a ROCK 5B: device tree masked, no nodes, a link that shall help."""
    board = rk3588()
    board.without("/sys/firmware", "/sys/kernel/debug", _UNIT, "/etc/passwd")
    board.nodes.clear()
    board.links = {k: v for k, v in board.links.items() if not k.startswith("/dev/dri")}
    board.links["/dev/rknpu"] = "dri/renderD129"
    board.here |= {"user": "root", "uid": 0, "gids": [0]}
    board.files["/sys/fs/cgroup/memory.max"] = "4000000000\n"
    return board


def x86() -> Board:
    """Return a PC with one model for the CPU."""
    board = _board("", "6.12.9-amd64", python=(3, 13))
    board.here["machine"] = "x86_64"
    board.without("/opt/rkvlmd/lib/python3.13/site-packages/rknn_toolkit")
    _cpus(board, "powersave", (0, 7, 4_000_000))
    for name, content in onnx_files("small").items():
        board.files[f"{MODELS}/small/{name}"] = content
    return board


TREES = {
    "rk3588": rk3588, "rk3588s": rk3588s, "rk3576": rk3576, "rk3562": rk3562,
    "rocket": rocket, "container": container, "x86": x86,
}  # fmt: skip
#: A library for PCs, for tests.
PC_LIBRARY = rkllm("1.3.0", machine=X86_64)
