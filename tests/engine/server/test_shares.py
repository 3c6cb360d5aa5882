"""What tenants have had and were entitled to, and the labels under which it is told."""

from prometheus_client.parser import text_string_to_metric_families

from evenhand_engine.backends.backend import ModelInfo
from evenhand_engine.frontend.metrics import Metrics, RequestMetrics
from evenhand_engine.frontend.metrics_collector import OTHER, Snapshot, TenantLabels
from evenhand_engine.frontend.share_tracker import Share, ShareTracker
from harness.stats import make_tenant_stats


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
    tenants = [make_tenant_stats(f"t{i}") for i in range(500)]
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
