"""What a user sees and clicks: Chromium on the pages that `dsel ui` serves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright.expect

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
ARGUMENTS = "--no-sandbox --disable-gpu --disable-background-networking --disable-dev-shm-usage"
PATIENCE = 90  # seconds for what another process has to do
STRATEGIES = {"random", "full", "target_only", "skmm", "bads", "itl", "gradmatch"}
GROUPS = ("arrivals", "gradients", "selection", "finetuning", "comparison")
FOLLOWS = "tiny_select_after_ingest_success"
SENSORS = (
    "tiny_arrivals",
    FOLLOWS,
    "tiny_select_after_ingest_failure",
    "tiny_compare_after_select_success",
    "tiny_models",
)
RUNS = """
query ($tags: [ExecutionTag!]) {
  runsOrError(filter: {tags: $tags}) { ... on Runs { results { runId jobName status } } }
}
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path"),
]


@dataclass(frozen=True)
class Site:
    """Dagster's and MLflow's pages, and the browser that looks at them."""

    dagster: str
    mlflow: str
    page: Page
    pictures: Path

    def seen(self, text: str, within: Locator | None = None) -> Locator:
        """The first place where this text shows; waits for it."""
        place = (within or self.page).get_by_text(text, exact=True).locator("visible=true").first
        expect(place).to_be_visible()
        return place

    def picture(self, name: str) -> None:
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def runs(self, **tags: str) -> list[dict[str, str]]:
        """Dagster's runs with these tags, the newest first."""
        wanted = [{"key": f"dagster/{key}", "value": value} for key, value in tags.items()]
        asked = json.dumps({"query": RUNS, "variables": {"tags": wanted}}).encode()
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.dagster}/graphql", asked, header)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["data"]["runsOrError"]["results"]

    def success(self, job: str, partition: str) -> str:
        """The id of this job's run of the partition, once it ended well."""

        def ended() -> list[dict[str, str]]:
            runs = [run for run in self.runs(partition=partition) if run["jobName"] == job]
            return [run for run in runs if run["status"] in ("SUCCESS", "FAILURE", "CANCELED")]

        run = until(f"the end of {job} of {partition}", ended)[0]
        assert run["status"] == "SUCCESS", run
        return run["runId"]


def until(what: str, found: Callable[[], Any]) -> Any:
    """Ask until there is something."""
    deadline = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE} s"
        time.sleep(0.3)
    return value


def answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
        return answer.status == 200
    return False


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def processes(home: Path) -> list[int]:
    """All that `dsel ui` has started and that still lives: they share its home."""
    mark, found = f"DSEL_HOME={home}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


@pytest.fixture
def project(ran: Any) -> Path:
    """The project with the tiny task alone, and with the history of its jobs."""
    for name in ("definitions.py", "workspace.yaml", "dagster.yaml"):
        shutil.copy(ROOT / name, ran.folder)
    for name in ("dsel_assets", "dbt_like_sql"):  # the code takes the link's folder for its root
        (ran.folder / name).symlink_to(ROOT / name)
    for name in ("tasks", ".dsel"):
        (ran.folder / name).mkdir()
    (ran.folder / "dagster").rename(ran.folder / ".dsel" / "dagster")
    ran.task("tasks/tiny")
    return ran.folder


@pytest.fixture
def served(project: Path) -> Iterator[tuple[str, str]]:
    """The addresses of both pages; at the end nothing of the server lives any more."""
    ports, home = free_ports(), project / "home"
    addresses = tuple(f"http://127.0.0.1:{port}" for port in ports)
    words = ["ui", "--port", str(ports[0]), "--mlflow-port", str(ports[1])]
    with (project / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsel_assets.cli", *words],
            cwd=project,
            env=os.environ | {"PYTHONPATH": str(project), "DSEL_HOME": str(home)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for page in (f"{addresses[0]}/server_info", f"{addresses[1]}/health"):
            until(page, lambda page=page: answers(page) or process.poll() is not None)
        assert process.poll() is None, (project / "ui.log").read_text()
        yield addresses
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PATIENCE)
        while left := processes(home):
            for number in left:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.1)


@pytest.fixture
def site(served: tuple[str, str], project: Path) -> Iterator[Site]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        page = browser.new_page(viewport={"width": 1500, "height": 950})
        page.set_default_timeout(1000 * PATIENCE)
        expect.set_options(timeout=1000 * PATIENCE)
        (project / "pictures").mkdir()
        yield Site(*served, page, project / "pictures")
        browser.close()


def see_the_lineage(site: Site) -> None:
    """The groups show; one of them opens and shows its asset."""
    site.page.goto(f"{site.dagster}/asset-groups")
    graph = site.page.locator("foreignObject")
    for group in GROUPS:
        site.seen(group, graph)
    site.picture("lineage")
    site.seen("selection", graph).click()
    site.seen("subsets", graph)
    site.picture("lineage of the selection")


def see_checks_and_sensors(site: Site) -> None:
    """Each check has a result; every sensor and the schedule are on."""
    site.page.goto(f"{site.dagster}/assets/tiny/sketches?view=checks")
    site.seen("fit"), site.seen("keeps_inner_products"), site.seen("Passed")
    site.seen("This is a blocking asset check.")
    site.picture("checks of the sketches")
    site.page.goto(f"{site.dagster}/assets/tiny/subsets?view=checks")
    site.seen("covers"), site.seen("weights_hold"), site.seen("more_than_chance").click()
    site.seen("like_a_uniform_draw")
    site.picture("checks of the subsets")
    site.page.goto(f"{site.dagster}/automation")
    for name in (*SENSORS, "tiny_reselect"):
        site.seen(name)
    expect(site.page.locator("input[type=checkbox]:checked")).to_have_count(len(SENSORS) + 1)
    site.picture("automation")


def choose_again(site: Site, strategy: str) -> None:
    """Materialise one strategy's subsets by the dialog; its run and its plot show."""
    page = site.page
    page.goto(f"{site.dagster}/assets/tiny/subsets")
    page.get_by_role("button", name="Materialize").first.click()
    site.seen("Select a partition or create one").click()
    site.seen(strategy, page.get_by_role("menu").first).click()
    site.picture("dialog")
    page.keyboard.press("Escape")  # the list closes, the dialog stays
    page.get_by_role("button", name="Launch 1 run").click()
    run = site.success("__ASSET_JOB", strategy)
    page.goto(f"{site.dagster}/runs/{run}")
    site.seen("Success"), site.seen(f"partition: {strategy}"), site.seen("RUN_SUCCESS")
    site.picture("run")
    page.goto(f"{site.dagster}/assets/tiny/subsets?view=partitions")
    site.seen(strategy).click()
    expect(page.get_by_text(run[:8])).to_be_visible()
    page.locator("tr", has_text="classes_chosen").get_by_text("[Show Markdown]").click()
    plot = page.get_by_role("dialog").locator("img")
    expect(plot).to_be_visible()
    assert plot.evaluate("image => image.naturalWidth") > 0
    site.picture("plot")


def see_mlflow(site: Site) -> None:
    """The generation with its cells by name; no strategy won, so that no model is registered."""
    page = site.page
    # 1 comes after MLflow's own experiment, 0
    page.goto(f"{site.mlflow}/#/experiments/1/runs?workflowType=machine_learning")
    generation = page.get_by_role("row").filter(has_text="generation 1")
    generation.get_by_role("button").click()
    for strategy in STRATEGIES:
        site.seen(f"{strategy} 10 seed 0")
    expect(page.get_by_text("matching runs")).to_have_text("29 matching runs")
    site.picture("runs in MLflow")
    site.seen("generation 1").click()
    site.seen("accuracy/itl:10"), site.seen("itl 10 seed 0,")
    site.picture("generation in MLflow")
    page.goto(f"{site.mlflow}/#/models?workflowType=machine_learning")
    site.seen("Registered Models"), site.seen("Create model")
    page.keyboard.press("Escape")  # what is new in MLflow
    site.picture("models in MLflow")
    page.goto(f"{site.dagster}/assets/tiny/verdict")
    expect(page.locator("tr", has_text="champion")).to_contain_text("none")
    site.picture("verdict")


def see_the_arrival(site: Site, partition: str) -> None:
    """The sensor took the file: its run and its partition show, and the selection follows."""
    run = site.success("tiny_ingest", partition)
    page = site.page
    page.goto(f"{site.dagster}/assets/tiny/sketches?view=partitions")
    site.seen(partition).click()
    expect(page.get_by_text(run[:8])).to_be_visible()
    site.picture("partitions")
    until("run of each strategy", lambda: len(site.runs(sensor_name=FOLLOWS)) == len(STRATEGIES))
    page.goto(f"{site.dagster}/runs")
    row = page.locator("[class*=RunsFeedRow_rowGrid]", has_text=run[:8])
    for text in ("tiny_ingest", f"partition: {partition}", "tiny_arrivals", "Success"):
        site.seen(text, row)
    site.picture("runs")


def test_a_users_way_through_the_pages(ran: Any, site: Site) -> None:
    see_the_lineage(site)
    see_checks_and_sensors(site)
    choose_again(site, "itl")
    ran.land("c.parquet", ran.rows(250, 280))  # the sensor waits for a second look at it
    see_mlflow(site)
    see_the_arrival(site, "c")
