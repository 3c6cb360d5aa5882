"""The server's smaller parts, each by itself."""

import asyncio
import json
import logging
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from evenhand_engine.backends.backend import ModelInfo
from evenhand_engine.errors import StartupError
from evenhand_engine.frontend.fair_executor import FairExecutor
from evenhand_engine.frontend.metrics import Metrics, RequestMetrics
from evenhand_engine.frontend.metrics_collector import OTHER, Snapshot, TenantLabels
from evenhand_engine.frontend.share_tracker import Share, ShareTracker
from evenhand_engine.logs import LineFormatter
from evenhand_engine.messages import TenantStats
from evenhand_engine.server.listener import allow_many_connections
from evenhand_engine.text.tokenizer import ChatTemplateError, Tokenizer

from .conftest import WAIT_SECONDS

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Hi</b> & 'bye'\n"},
    {"role": "assistant", "content": "Ciao."},
    {"role": "user", "content": "東京?"},
]


@pytest.mark.parametrize("module", ["app", "admin", "startup", "run"])
def test_the_http_process_loads_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, evenhand_engine.server.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


async def test_tenants_take_turns_in_the_threads() -> None:
    executor = FairExecutor(1)
    release, order = threading.Event(), list[str]()
    try:
        first = asyncio.ensure_future(executor.run("flood", release.wait))
        jobs = [executor.run("flood", lambda i=i: order.append(f"flood {i}")) for i in range(3)]  # type: ignore[misc]
        jobs += [executor.run(tenant, lambda t=tenant: order.append(t)) for tenant in ("a", "b")]  # type: ignore[misc]
        waiting = [asyncio.ensure_future(job) for job in jobs]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(first, *waiting)
    finally:
        executor.close()
    assert order == ["flood 0", "a", "b", "flood 1", "flood 2"]


async def test_a_tenant_leaves_a_thread_to_the_others() -> None:
    executor = FairExecutor(2)
    release, ran = threading.Event(), list[str]()
    try:
        flood = [asyncio.ensure_future(executor.run("flood", release.wait)) for _ in range(3)]
        await asyncio.wait_for(executor.run("other", lambda: ran.append("other")), WAIT_SECONDS)
        release.set()
        assert await asyncio.gather(*flood) == [True] * 3
    finally:
        release.set()
        executor.close()
    assert ran == ["other"]


async def test_who_gives_up_waiting_takes_no_turn() -> None:
    executor = FairExecutor(1)
    release, ran = threading.Event(), list[str]()
    try:
        first = asyncio.ensure_future(executor.run("a", release.wait))
        given_up = asyncio.ensure_future(executor.run("a", lambda: ran.append("given up")))
        kept = asyncio.ensure_future(executor.run("a", lambda: ran.append("kept")))
        await asyncio.sleep(0)
        given_up.cancel()
        release.set()
        await asyncio.gather(first, kept)
    finally:
        executor.close()
    assert ran == ["kept"]


async def test_errors_come_out_of_the_threads() -> None:
    executor = FairExecutor(1)
    try:
        with pytest.raises(ZeroDivisionError):
            await executor.run("a", lambda: 1 / 0)
        assert await executor.run("a", lambda: 7) == 7
    finally:
        executor.close()


def test_log_lines_cannot_be_forged() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "request", None, None)
    record.fields = {"path": "/a\n2026 INFO forged", "status": 200, "reason": "", "quote": 'a "b"'}
    line = LineFormatter().format(record)
    assert "\n" not in line
    assert line.endswith(r"""INFO x request path="/a\n2026 INFO forged" status=200 quote="a \"b\"" """.strip())
    record.msg = "two\nlines"
    assert "\n" not in LineFormatter().format(record)


def test_a_traceback_is_one_line() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    line = LineFormatter().format(record)
    assert "\n" not in line
    assert "ValueError" in line


def test_shares_follow_service_and_weights() -> None:
    tracker = ShareTracker()
    tracker.observe({"a": 0, "b": 0}, {"a": 3, "b": 1}, 0.0)
    assert tracker.shares() == {}
    tracker.observe({"a": 50, "b": 50}, {"a": 3, "b": 1}, 1.0)
    assert tracker.shares() == {"a": Share(0.5, 0.75), "b": Share(0.5, 0.25)}


def test_who_has_no_work_is_entitled_to_nothing() -> None:
    tracker = ShareTracker()
    tracker.observe({"a": 0, "b": 0}, {"a": 1, "b": 1}, 0.0)
    tracker.observe({"a": 100}, {"a": 1}, 1.0)
    assert tracker.shares() == {"a": Share(1.0, 1.0), "b": Share(0.0, 0.0)}


def test_a_tenant_that_is_gone_is_forgotten() -> None:
    tracker = ShareTracker()
    tracker.observe({"a": 0, "b": 0}, {"a": 1, "b": 1}, 0.0)
    tracker.observe({"a": 60, "b": 40}, {"a": 1, "b": 1}, 1.0)
    tracker.forget("b")
    tracker.forget("never seen")
    assert tracker.shares().keys() == {"a"}
    assert tracker.shares()["a"].attained == 1.0


def test_old_service_fades() -> None:
    tracker = ShareTracker()
    tracker.observe({"a": 100}, {"a": 1}, 0.0)
    tracker.observe({"a": 100, "b": 100}, {"b": 1}, 300.0)
    assert tracker.shares()["b"].attained > 0.99


def test_labels_are_bounded() -> None:
    labels = TenantLabels(limit=2)
    assert [labels(t) for t in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]


def test_tenants_beyond_the_labels_are_added_up() -> None:
    info = ModelInfo(model_name="m", max_model_len=100)
    tenants = [
        TenantStats(
            tenant_id=f"t{i}",
            num_running=1,
            num_waiting=0,
            num_kv_blocks=2,
            service=10,
            virtual_service=0.0,
            ahead=0.0,
            lag=0.0,
            lag_bound=0.0,
            num_preemptions=0,
            num_prompt_tokens=0,
            num_generation_tokens=0,
        )
        for i in range(500)
    ]
    snapshot = Snapshot(info, None, tenants, {}, "sha256:x", "files", True, {"applied": 1}, {"t1": {"rate": 2}})
    metrics = Metrics("m", 100, lambda: snapshot)
    for tenant in tenants:
        request = RequestMetrics(metrics, tenant.tenant_id, 5, 7, 0.0)
        request.start(1, 1.0)
        request.take_tokens(1, 2.0)
        request.end("finished", "stop", 0, 3.0)
    families = list(text_string_to_metric_families(metrics.admin_text().decode()))
    labels = {sample.labels["tenant"] for family in families for sample in family.samples if "tenant" in sample.labels}
    assert OTHER in labels
    assert len(labels) == 201
    services = {s.labels["tenant"]: s.value for f in families if f.name == "evenhand_service" for s in f.samples}
    assert sum(services.values()) == 5000
    assert services[OTHER] == 3000
    assert len({(s.name, *sorted(s.labels.items())) for f in families for s in f.samples}) == sum(
        len(f.samples) for f in families
    ), "no sample is there twice"


def test_latencies_of_a_request() -> None:
    info = ModelInfo(model_name="m", max_model_len=100)
    snapshot = Snapshot(info, None, [], {}, "", "default", True, {}, {})
    metrics = Metrics("m", 100, lambda: snapshot)
    request = RequestMetrics(metrics, "t", 5, 7, 10.0)
    request.start(2, 11.0)
    request.take_tokens(0, 11.5)
    request.take_tokens(1, 13.0)
    request.take_tokens(2, 14.0)
    request.end("finished", "length", 2, 15.0)
    sums = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics.public_text().decode())
        for sample in family.samples
        if sample.name.endswith("_sum")
    }
    assert sums["vllm:request_num_preemptions_sum"] == 2
    assert sums["vllm:request_params_n_sum"] == 1
    assert sums["vllm:request_max_num_generation_tokens_sum"] == 3
    assert sums["vllm:request_queue_time_seconds_sum"] == 1.0
    assert sums["vllm:time_to_first_token_seconds_sum"] == 3.0
    assert sums["vllm:inter_token_latency_seconds_sum"] == 1.0
    assert sums["vllm:request_time_per_output_token_seconds_sum"] == 0.5
    assert sums["vllm:request_prefill_time_seconds_sum"] == 2.0
    assert sums["vllm:request_decode_time_seconds_sum"] == 2.0
    assert sums["vllm:request_inference_time_seconds_sum"] == 4.0
    assert sums["vllm:e2e_request_latency_seconds_sum"] == 5.0


TEMPLATES = [
    "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{% for m in messages %}\n    {% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m | tojson }}\n{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}>>{% endif %}",
    "{{ strftime_now('%Y') | length }} {{ messages | length }} {{ flag | default('off') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_templates_render_as_by_transformers(
    model_dir: Path, tmp_path: Path, template: str, add_generation_prompt: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    ours = Tokenizer(tmp_path).render_chat(
        MESSAGES, add_generation_prompt=add_generation_prompt, variables={"flag": "on"}
    )
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|im_start|>", eos_token="<|im_end|>"
    ).apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt, flag="on"
    )
    assert ours == theirs


def with_config(model_dir: Path, tmp_path: Path, **config: object) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(tmp_path)


def test_template_errors_are_the_clients(model_dir: Path, tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ 1 + messages[0] }}"
    tokenizer = with_config(model_dir, tmp_path, chat_template=template)
    with pytest.raises(ChatTemplateError, match="user first"):
        tokenizer.render_chat(MESSAGES)
    with pytest.raises(ChatTemplateError):
        tokenizer.render_chat(MESSAGES[1:])
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    tokenizer = with_config(model_dir, tmp_path, chat_template="{{ messages[0].tool_calls | tojson }}")
    with pytest.raises(ChatTemplateError, match="recursion"):
        tokenizer.render_chat([{"role": "user", "tool_calls": deep}])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}",
    ],
)
def test_templates_are_in_a_sandbox(model_dir: Path, tmp_path: Path, attack: str) -> None:
    tokenizer = with_config(model_dir, tmp_path, chat_template=attack)
    with pytest.raises(ChatTemplateError):
        tokenizer.render_chat(MESSAGES)


def test_end_of_sequence_ids_come_from_everywhere(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 0], "temperature": 0.6, "top_k": 20}')
    tokenizer = with_config(model_dir, tmp_path, eos_token="<|im_end|>")
    assert tokenizer.eos_token_ids == {0, 2, 5, 7}
    assert (tokenizer.sampling_defaults.temperature, tokenizer.sampling_defaults.top_k) == (0.6, 20)
    assert not tokenizer.has_chat_template


def test_the_vocabulary_is_what_the_model_can_take(model_dir: Path, tmp_path: Path) -> None:
    """Added tokens may lie beyond its embedding; an end of sequence that is there cannot be sampled."""
    (tmp_path / "config.json").write_text('{"vocab_size": 300, "eos_token_id": [7, 300]}')
    tokenizer = with_config(model_dir, tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (300, {7})
    (tmp_path / "config.json").write_text('{"vocab_size": "many"}')
    assert with_config(model_dir, tmp_path).vocab_size > 256, "the engine core says what is wrong with it"


def test_unusable_model_directories(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="save_pretrained"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match="cannot be loaded"):
        Tokenizer(tmp_path)
    with pytest.raises(StartupError, match="broken"):
        with_config(model_dir, tmp_path, chat_template="{% if %}")
    for template in ([1], [{"name": "default"}], 7):
        with pytest.raises(StartupError, match=r"the chat template of .* is broken"):
            with_config(model_dir, tmp_path, chat_template=template)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match=r"the chat template of .* is broken"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(StartupError, match="not a JSON object"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("soft", "hard", "most"),
    [(1024, 524_288, 524_288), (256, resource.RLIM_INFINITY, 10_240), (20_000, resource.RLIM_INFINITY, 20_000)],
)
def test_as_many_connections_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, most: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    allow_many_connections()
    assert limits[-1] == (most, hard), "macOS refuses an infinite soft limit, though its hard one is"


def test_the_system_takes_the_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        allow_many_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
