"""`evenhand simulate` from the outside: its tables, its JSON, and how it says no."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evenhand_engine.commands.simulate import simulate

TRACE = "tenant,arrival_s,prompt_tokens,output_tokens\n" + "".join(
    f"{tenant},{0.05 * i:.2f},100,50\n" for i in range(60) for tenant in ("big", "big", "small")
)
POLICY = """
apiVersion: evenhand.dev/v1alpha1
kind: TenantPolicy
metadata: {name: %s}
spec: {tenant: %s, weight: %d}
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(simulate, [str(argument) for argument in arguments])


def test_json_has_a_report_for_each_policy(trace: Path) -> None:
    names = ("fair", "fcfs", "static", "vtc", "lcf", "drr", "rpm:30")
    chosen = [word for name in names for word in ("--scheduling-policy", name)]
    result = run("--trace", trace, "-o", "json", "--kv-tokens", "2000", *chosen)
    assert result.exit_code == 0, result.output
    reports = {report["policy"]: report for report in json.loads(result.stdout)}
    assert tuple(reports) == names
    assert [reports[name]["num_served"] for name in names] == [180] * 6 + [60]
    assert [tenant["tenant_id"] for tenant in reports["fair"]["tenants"]] == ["big", "small"]
    assert reports["fcfs"]["mean_difference"] > 4 * reports["fair"]["mean_difference"]
    assert reports["static"]["tokens_per_s"] < reports["fcfs"]["tokens_per_s"]


def test_policies_of_a_folder_decide_the_weights(trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "all.yaml").write_text(
        "---".join(POLICY % (name, name, weight) for name, weight in (("big", 4), ("small", 1)))
    )
    result = run("--trace", trace, "-o", "json", "--kv-tokens", "1000", "--policies", folder)
    assert result.exit_code == 0, result.output
    big, small = json.loads(result.stdout)[0]["tenants"]
    assert (big["weight"], small["weight"]) == (4, 1)
    assert big["ttft_p50_s"] < small["ttft_p50_s"]
    assert big["share_of_entitlement"] == pytest.approx(1.0, abs=0.1)


def test_a_table_for_people(trace: Path) -> None:
    result = run("--trace", trace)
    assert result.exit_code == 0, result.output
    assert "Tenants under fair" in result.stdout
    assert "small" in result.stdout


def test_a_recorded_run_replaces_the_step_time(trace: Path, tmp_path: Path) -> None:
    steps = tmp_path / "steps.csv"
    rows = [f"{i % 7 * 10},{i % 5},{i % 3 * 100},{i % 11 * 50},{1.0 + i % 7}" for i in range(40)]
    steps.write_text("prefill_tokens,decode_tokens,prefill_context,decode_context,seconds\n" + "\n".join(rows))
    slow, fast = (
        json.loads(run("--trace", trace, "-o", "json", *more).stdout)[0]["tokens_per_s"]
        for more in (("--steps", steps), ())
    )
    assert slow < fast / 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --trace FILE or --workload NAME"),
        (("--workload", "nonsense"), "'nonsense' is none of overload"),
        (("--workload", "overload", "--preset", "tpu"), "'tpu' is none of a10g-llama-2-7b"),
        (("--workload", "overload", "--scheduling-policy", "rpm:0"), "'rpm:0' is none of fair"),
        (("--workload", "overload", "--scheduling-policy", "rpm:N"), "'rpm:N' is none of fair"),
        (("--workload", "overload", "--until", "nan"), "'nan' is not a time"),
        (("--workload", "overload", "--until", "0"), "0.0 is not in the range x>0"),
        (("--workload", "overload", "--seed", "-1"), "-1 is not in the range x>=0"),
        (("--workload", "overload", "--kv-tokens", "x"), "'x' is not a valid integer range"),
        (("--workload", "overload", "-o", "yaml"), "'yaml' is not one of 'table', 'json'"),
        (("--workload", "overload", "--trace", "some.csv"), "either --trace FILE or --workload NAME"),
    ],
)
def test_a_wrong_argument_is_named(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", "nowhere.csv"), "nowhere.csv: cannot be read"),
        (("--trace", "empty.csv"), "empty.csv: column arrival_s is missing; needed are arrival_s, prompt_tokens"),
        (("--trace", "nobody.csv"), "nobody.csv: the trace has no requests"),
        (("--trace", "torn.csv"), "torn.csv, line 3: Expected `int`, got `str` - at `$.prompt_tokens`"),
        (("--trace", "latin.csv"), "latin.csv: cannot be read"),
        (("--trace", "."), ".: cannot be read"),
        (("--workload", "overload", "--steps", "nowhere.csv"), "nowhere.csv: cannot be read"),
        (("--workload", "overload", "--steps", "few.csv"), "few.csv: 1 steps are too few for a fit"),
        (("--workload", "overload", "--policies", "nowhere"), "nowhere"),
        (("--workload", "overload", "--policies", "bad"), "bad/a.yaml"),
        (("--workload", "overload", "--max-model-len", "100"), "512 tokens exceeds the context of 100"),
        (("--workload", "overload", "--kv-tokens", "500", "--scheduling-policy", "vtc"), "never fits"),
        (("--workload", "overload", "--until", "3", "--plot", "nowhere/run.png"), "nowhere/run.png: cannot be written"),
        (("--workload", "overload", "--until", "3", "--plot", "run.pgn"), "run.pgn: cannot be written"),
    ],
)
def test_what_cannot_be_simulated_ends_with_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = "arrival_s,prompt_tokens,output_tokens\n"
    for name, text in {"empty": "", "nobody": header, "torn": f"{header}0,1,1\n0,many,1\n"}.items():
        (tmp_path / f"{name}.csv").write_text(text)
    (tmp_path / "latin.csv").write_bytes(b"tenant\xe9\n")
    (tmp_path / "few.csv").write_text(
        "prefill_tokens,decode_tokens,prefill_context,decode_context,seconds\n1,1,1,1,1\n"
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.yaml").write_text(POLICY % ("a", "a", -1))
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("evenhand: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


@pytest.mark.parametrize("fault", ["late-gauges", "frozen-gauges", "slow-hop", "restart", "wrong-sizes", "silent"])
def test_a_sidecar_is_simulated_with_whatever_goes_wrong(fault: str) -> None:
    arguments = [
        "--workload",
        "poisson_short_long",
        "--until",
        "35",
        "--sidecar",
        "--sidecar-fault",
        fault,
        "-o",
        "json",
    ]
    result = CliRunner().invoke(simulate, [*arguments, "--preset", "h100-8b"])
    assert result.exit_code == 0, result.output
    reports = {report["policy"]: report for report in json.loads(result.output)}
    assert set(reports) == {"fair", "sidecar"}
    assert reports["sidecar"]["num_served"] > 0.8 * reports["fair"]["num_served"]


def test_an_engine_behind_the_sidecar_may_leave_part_of_each_step_to_others() -> None:
    arguments = ["--workload", "chat_vs_flood", "--preset", "h100-8b", "--kv-tokens", "100000", "--until", "45"]
    waits = []
    for more in ([], ["--long-prefill-tokens", "680"]):
        result = CliRunner().invoke(simulate, [*arguments, "--sidecar", "-o", "json", *more])
        assert result.exit_code == 0, result.output
        reports = {report["policy"]: report["tenants"] for report in json.loads(result.output)}
        waits.append({tenant["tenant_id"]: tenant for tenant in reports["sidecar"]}["chat"]["ttft_p99_s"])
    assert waits[1] < waits[0] / 3
