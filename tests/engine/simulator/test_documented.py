"""Every documented `evenhand simulate` runs, in a small size, and every named workload under every kind of policy."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from evenhand_engine.commands.simulate import simulate
from evenhand_engine.simulator.report import RunReport, TenantReport
from evenhand_engine.simulator.workloads import WORKLOADS

ROOT = Path(__file__).parents[3]
POLICIES = ("fair", "fcfs", "static", "vtc", "lcf", "drr", "rpm:30")
COMMAND = re.compile(r"^ *evenhand simulate (.+)$", re.M)
SMALL = ("--until", "3", "-o", "json")  # the last one of an option counts


def documented() -> list[str]:
    """The arguments of each example in the documents and in the command's own help."""
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    return [found for text in (*texts, simulate.help or "") for found in COMMAND.findall(text)]


def test_there_are_examples() -> None:
    assert len(documented()) >= 6


@pytest.mark.parametrize("example", documented())
def test_an_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "requests.csv").write_text("tenant,arrival_s,prompt_tokens,output_tokens\na,0,50,20\nb,0.5,30,10\n")
    (tmp_path / "steps.csv").write_text(
        "prefill_tokens,decode_tokens,prefill_context,decode_context,seconds\n" + "10,2,0,90,0.02\n20,1,5,50,0.03\n" * 5
    )
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "a.yaml").write_text(
        "{apiVersion: evenhand.dev/v1alpha1, kind: TenantPolicy, metadata: {name: a}, spec: {weight: 2}}"
    )
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(example)
    result = CliRunner().invoke(simulate, [*arguments, *SMALL])
    assert result.exit_code == 0, result.output
    reports = json.loads(result.stdout)
    assert len(reports) == max(1, arguments.count("--scheduling-policy")) + arguments.count("--sidecar")
    assert all(report["seconds"] > 0 and report["tenants"] for report in reports)
    if "--plot" in arguments:
        assert (tmp_path / arguments[arguments.index("--plot") + 1]).stat().st_size > 0


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_workload_runs_under_every_kind_of_policy(workload: str) -> None:
    chosen = [word for name in POLICIES for word in ("--scheduling-policy", name)]
    size = ("--kv-tokens", "100000") if workload in ("chat_vs_flood", "reasoning_prompt") else ()
    result = CliRunner().invoke(simulate, ["--workload", workload, *chosen, *size, *SMALL])
    assert result.exit_code == 0, result.output
    reports = json.loads(result.stdout)
    assert [report["policy"] for report in reports] == list(POLICIES)
    assert set(reports[0]) == set(RunReport.__struct_fields__)
    assert set(reports[0]["tenants"][0]) == set(TenantReport.__struct_fields__)


def test_the_workloads_are_those_that_are_published() -> None:
    assert list(WORKLOADS) == [
        "overload",
        "proportional",
        "on_off",
        "poisson_short_long",
        "dist_shift",
        "chat_vs_flood",
        "reasoning_prompt",
    ]
