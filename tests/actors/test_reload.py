"""Settings and models that are read again while the daemon serves."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd import live
from rkvlmd import settings as settings_module
from rkvlmd.actors.house import House
from rkvlmd.errors import RkvlmdError, SettingsError
from rkvlmd.messages import ModelState
from rkvlmd.models import catalog
from rkvlmd.reload import Reloader
from rkvlmd.settings import Settings
from tests.fakes.machine import Machine
from tests.fakes.machine import machine as machine  # a fixture
from tests.fakes.scripted import chat, collect, make_model, submit, until_phase

KEYS = {
    f"{s}.{f.name}" for s, cls in settings_module.SECTIONS.items() for f in dataclasses.fields(cls)
}


def changed(settings: Settings, key: str) -> Settings:
    """Return the settings with another value for one key."""
    section, _, option = key.partition(".")
    old = getattr(getattr(settings, section), option)
    new: Any = not old if isinstance(old, bool) else ("x",) if isinstance(old, tuple) else (
        f"{old}x" if isinstance(old, str) else old + 1
    )  # fmt: skip
    return dataclasses.replace(
        settings, **{section: dataclasses.replace(getattr(settings, section), **{option: new})}
    )


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_key_is_applied_or_waits(key: str) -> None:
    running = Settings()
    wanted = changed(running, key)
    merged, applied, waiting = live.changes(running, wanted)
    assert [*applied, *waiting] == [key]
    assert (applied == [key]) == (key in live.LIVE)
    assert merged == (wanted if applied else running)


def test_what_is_live_exists() -> None:
    assert live.LIVE <= KEYS


def reloader(house: House, wanted: Settings | SettingsError) -> Reloader:
    def read() -> Settings:
        if isinstance(wanted, SettingsError):
            raise wanted
        return wanted

    def scan(settings: Settings) -> Any:
        return catalog.scan(Path(settings.models.dir), demo=False)

    return Reloader(house, read, scan)


def with_queue(settings: Settings, **queue: Any) -> Settings:
    return dataclasses.replace(settings, queue=dataclasses.replace(settings.queue, **queue))


async def test_settings_reach_everybody_while_work_goes_on(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a") as house:
        async with house.tools.lease.hold("somebody", "a"):
            job = submit(house, chat(model="a"))
            await until_phase(house, job, "waiting")
            wanted = with_queue(house.settings, max_jobs=1, max_jumps=0)
            wanted = dataclasses.replace(
                wanted,
                http=dataclasses.replace(wanted.http, bind="127.0.0.1:1", ping_seconds=3.0),
                models=dataclasses.replace(wanted.models, keep_alive_seconds=7.0),
                media=dataclasses.replace(wanted.media, remote=True),
                prep=dataclasses.replace(wanted.prep, children=1),
            )
            said = await reloader(house, wanted).run()
            assert said["applied"] == [
                "http.ping_seconds", "models.keep_alive_seconds", "media.remote", "prep.children",
                "queue.max_jobs", "queue.max_jumps",
            ]  # fmt: skip
            assert said["needs_restart"] == ["http.bind"]
            assert said["rejected"] == []
            with pytest.raises(RkvlmdError, match="1 requests are waiting"):
                submit(house, chat(model="a"), "10.0.0.2")
        assert (await collect(job))[1].reason == "stop"
        assert house.settings.http.bind == "127.0.0.1:0"
        assert house.residency.model("a").idle_seconds == pytest.approx(7.0, abs=5.0)
        for holder in (
            house.tools, house.residency, house.residency._loader, house.scheduler, house.tools.prep,
        ):  # fmt: skip
            held = getattr(holder, "settings", None) or holder._settings  # type: ignore[attr-defined]
            assert held is house.settings, holder
        assert house.tools.fetcher._settings is house.settings.media
        assert house.scheduler.gate._settings is house.settings.queue
        assert house.tools.lease._rules.max_jumps == 0


async def test_with_a_wrong_key_nothing_is_applied(
    tmp_path: Path, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    async with machine.house(tmp_path, "a") as house:
        before = house.settings
        make_model(tmp_path / "models", "b")
        said = await reloader(house, SettingsError(["queue.max_job: no such setting"])).run()
        assert said["rejected"] == ["queue.max_job: no such setting"]
        assert said["applied"] == said["needs_restart"] == []
        assert said["models"]["added"] == ["b"]  # the folder is looked at all the same
        assert house.settings is before
    assert "no such setting" in caplog.text


async def test_what_is_applied_must_fit_what_is_not(tmp_path: Path, machine: Machine) -> None:
    async with machine.house(tmp_path, "a", engine={"heal_max_seconds": 600.0}) as house:
        # Fine in the file, where the listener takes larger bodies; not without a restart.
        wanted = dataclasses.replace(
            with_queue(house.settings, max_bytes=1 << 31),
            http=dataclasses.replace(house.settings.http, max_body_bytes=1 << 30, bind="[::1]:0"),
        )
        said = await reloader(house, wanted).run()
        assert said["rejected"] == []
        narrow = with_queue(house.settings, max_bytes=1 << 20)
        said = await reloader(house, narrow).run()
        assert said["rejected"] == ["http.max_body_bytes: must not be above queue.max_bytes"]
        assert house.settings.queue.max_bytes == 1 << 31


async def test_the_log_level(tmp_path: Path, machine: Machine) -> None:
    root = logging.getLogger()
    before = root.level
    try:
        async with machine.house(tmp_path, "a") as house:
            wanted = dataclasses.replace(
                house.settings, log=dataclasses.replace(house.settings.log, level="debug")
            )
            await reloader(house, wanted).run()
            assert root.level == logging.DEBUG
    finally:
        root.setLevel(before)


def edit(folder: Path, **top: Any) -> None:
    tree = json.loads((folder / "rkvlm.json").read_text())
    (folder / "rkvlm.json").write_text(json.dumps(tree | top))


async def test_models_come_change_and_go(tmp_path: Path, machine: Machine) -> None:
    models = tmp_path / "models"
    async with machine.house(tmp_path, "changed", "gone", "loaded", "stays") as house:
        run = reloader(house, house.settings).run
        assert (await run())["models"] == {
            "added": [], "changed": [], "removed": [], "waiting": [], "problems": [],
        }  # fmt: skip
        await house.residency.load("loaded")
        make_model(models, "new")
        edit(models / "changed", description="another one")
        edit(models / "loaded", description="another one")
        shutil.rmtree(models / "gone")
        make_model(models, "broken")
        (models / "broken" / "rkvlm.json").write_text("{")
        said = (await run())["models"]
        assert (said["added"], said["removed"]) == (["new"], ["gone"])
        assert (said["changed"], said["waiting"]) == (["changed", "loaded"], ["loaded"])
        assert len(said["problems"]) == 1
        assert house.status()["problems"] == said["problems"]
        names = [view.name for view in house.residency.models()]
        assert names == ["changed", "loaded", "new", "stays"]
        assert house.residency.entry("changed").manifest.description == "another one"
        # What is loaded stays as it is until it leaves.
        assert house.residency.entry("loaded").manifest.description == ""
        assert (await collect(submit(house, chat(model="loaded"))))[1].reason == "stop"
        assert (await collect(submit(house, chat(model="new"))))[1].reason == "stop"
        assert house.residency.model("loaded").encoders_kept == 0  # not those of the old manifest
        assert house.residency.entry("loaded").manifest.description == "another one"
        assert (await run())["models"]["changed"] == []


async def test_a_model_that_was_removed_while_loaded_goes_with_its_unload(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a", "b") as house:
        await house.residency.load("a")
        shutil.rmtree(tmp_path / "models" / "a")
        async with house.tools.lease.hold("somebody", "a"):
            job = submit(house, chat(model="a"))
            await until_phase(house, job, "waiting")
            said = await reloader(house, house.settings).run()
            assert said["models"]["waiting"] == ["a"]
        assert (await collect(job))[1].reason == "stop"
        assert (await house.residency.unload("a")).state is ModelState.ABSENT
        with pytest.raises(RkvlmdError) as info:
            submit(house, chat(model="a"))
        assert info.value.code == "model_not_found"
        make_model(tmp_path / "models", "a")
        assert (await reloader(house, house.settings).run())["models"]["added"] == ["a"]
        assert (await collect(submit(house, chat(model="a"))))[1].reason == "stop"


async def test_kept_encoders_of_a_model_that_was_removed_leave(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a", "b") as house:
        await house.residency.load("a")
        await house.residency.load("b")
        shutil.rmtree(tmp_path / "models" / "a")
        await reloader(house, house.settings).run()
        with trio.fail_after(60):
            while machine.alive() != ["decoder:b", "encoder:b"]:
                await house.residency.wait_change()
        assert [view.name for view in house.residency.models()] == ["b"]


# --- drain -------------------------------------------------------------------------------


async def test_drained_refuses_what_is_new_and_finishes_what_is_not(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a", queue={"drain_retry_seconds": 17}) as house:
        async with house.tools.lease.hold("somebody", "a"):
            job = submit(house, chat(model="a"))
            await until_phase(house, job, "waiting")
            early = house.scheduler.reserve("10.0.0.2", 100)  # its body is on the way
            house.scheduler.pause()
            assert house.draining
            assert house.status()["state"] == "draining"
            with pytest.raises(RkvlmdError) as info:
                submit(house, chat(model="a"))
            error = info.value
            assert (error.code, error.status, error.retry_after) == ("draining", 503, 17)
            with pytest.raises(RkvlmdError, match="no new requests"):
                house.scheduler.submit(early, chat(model="a"), request_id="early")
            early.release()
        assert (await collect(job))[1].reason == "stop"
        with trio.fail_after(60):
            await house.scheduler.wait_empty()
        assert house.scheduler.gate.refusals == {"draining": 2}
        house.scheduler.resume()
        assert (await collect(submit(house, chat(model="a"))))[1].reason == "stop"
