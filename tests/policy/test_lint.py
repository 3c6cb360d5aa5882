"""Lint: the operator's own judgement of a set of files, and what it cannot judge without a cluster."""

import pytest

from evenhand_policy.errors import Reason
from evenhand_policy.lint import Level, LintReport, lint

KEY = "a-key-that-nobody-can-guess-0001"


def policy(name: str, namespace: str = "inference", spec: str = "{}") -> str:
    metadata = f"{{name: {name}, namespace: {namespace}}}"
    return f"apiVersion: evenhand.dev/v1alpha1\nkind: TenantPolicy\nmetadata: {metadata}\nspec: {spec}\n---\n"


def pool(name: str = "default", namespace: str = "inference", spec: str = "") -> str:
    metadata = f"{{name: {name}, namespace: {namespace}}}"
    spec = f"{{selector: {{matchLabels: {{app: x}}}}{spec}}}"
    return f"apiVersion: evenhand.dev/v1alpha1\nkind: EnginePool\nmetadata: {metadata}\nspec: {spec}\n---\n"


def report_of(**files: str) -> LintReport:
    return lint((f"{name}.yaml", text.encode()) for name, text in files.items())


def told(report: LintReport) -> list[tuple[str, str, int | None, str, Reason | None]]:
    return [
        (level, each.file, each.line, each.field, each.reason) for level, each in report.remarks
    ]  # everything but the message


def keyed(secret: str) -> str:
    return f"{{identities: [{{name: k, type: APIKey, apiKey: {{secretRef: {{name: {secret}}}}}}}]}}"


def test_sound_files_of_several_pools_and_of_other_kinds_have_no_remark() -> None:
    deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec: {replicas: 3}\n---\n"
    mine = "apiVersion: example.org/v1\nkind: TenantPolicy\nwhatever: 1\n---\n"
    secret = f"apiVersion: v1\nkind: Secret\nmetadata: {{name: keys, namespace: inference}}\nstringData: {{a: {KEY}}}\n"
    report = report_of(
        pools=pool() + pool("gold"),
        a=policy("a") + deployment + mine,
        b=policy("b", spec="{poolRef: {name: gold}}"),
        c=policy("a2", spec=keyed("keys")) + secret,
    )
    assert report == LintReport((), 3, 2)


def test_every_mistake_is_told_with_file_line_field_and_reason() -> None:
    report = report_of(
        a=pool() + policy("a", spec="\n  weight: 0"), b=policy("b", spec="\n  limits:\n    queueTimeout: 60")
    )
    assert told(report) == [
        ("error", "a.yaml", 10, "spec.weight", Reason.INVALID),
        ("error", "b.yaml", 6, "spec.limits.queueTimeout", Reason.INVALID),
    ]
    assert report.remarks[1].finding.message == "expected a duration such as 500ms, 60s or 1m30s"


def test_two_files_that_claim_the_same_name_the_place_of_the_other() -> None:
    report = report_of(
        p=pool(), a=policy("a", spec="{tenant: seat}"), b=policy("b", spec="\n  tenant: seat"), c=policy("b")
    )
    assert told(report) == [
        ("error", "b.yaml", 5, "spec.tenant", Reason.CONFLICTED),
        ("error", "c.yaml", 3, "", None),
    ]
    assert report.remarks[0].finding.message.endswith("(the other: a.yaml:1)")
    assert "defined twice: here and at b.yaml:1" in report.remarks[1].finding.message


def test_guarantees_of_a_pool_are_added_up_and_those_of_two_pools_are_not() -> None:
    half = "{kvCache: {guaranteedPercent: 60}}"
    gold = "{poolRef: {name: gold}, kvCache: {guaranteedPercent: 60}}"
    assert not report_of(p=pool() + pool("gold"), a=policy("a", spec=half), b=policy("b", spec=gold)).remarks
    report = report_of(p=pool(), a=policy("a", spec=half), b=policy("b", spec=half))
    assert told(report) == [("error", "b.yaml", 4, "spec.kvCache.guaranteedPercent", Reason.GUARANTEE_OVERCOMMITTED)]


def test_guests_are_judged_by_the_labels_of_the_namespaces_among_the_files() -> None:
    selector = "{from: Selector, selector: {matchLabels: {tenant: yes-of-course}}}"
    admitting = pool(spec=f", allowedNamespaces: {selector}")
    guest = policy("a", "chat", "{poolRef: {name: default, namespace: inference}}")

    def namespace(label: str) -> str:
        return f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: chat, labels: {{tenant: {label}}}}}\n"

    assert not report_of(p=admitting, a=guest, n=namespace("yes-of-course")).remarks
    assert told(report_of(p=admitting, a=guest, n=namespace("other"))) == [
        ("error", "a.yaml", 4, "spec.poolRef", Reason.NOT_ALLOWED)
    ]
    assert told(report_of(p=admitting, a=guest)) == [("note", "a.yaml", 4, "spec.poolRef", None)]
    heavy = guest.replace("{poolRef", "{weight: 9, poolRef")
    report = report_of(p=admitting, a=heavy, n=namespace("yes-of-course"))
    assert {row[-1] for row in told(report)} == {Reason.EXCEEDS_GRANT}


def test_pool_that_is_elsewhere_is_a_note_and_all_else_is_checked() -> None:
    """Guests of one name in two namespaces are two tenants; what the pool grants is not known."""
    header = "identities: [{name: h, type: Header, header: {value: search}}]"
    reference = f"{{weight: 500, poolRef: {{name: shared, namespace: inference}}, {header}}}"
    report = report_of(a=policy("a", "chat", reference), b=policy("a", "batch", reference.replace("search", "batch")))
    assert told(report) == [("note", f"{name}.yaml", 4, "spec.poolRef", None) for name in "ab"]
    assert "EnginePool inference/shared is not among the files" in report.remarks[0].finding.message
    own = report_of(a=policy("a", spec="{tenant: seat}"), b=policy("b", spec="{tenant: seat}"))
    assert [row[-1] for row in told(own) if row[0] == Level.ERROR] == [Reason.CONFLICTED]


def test_secret_that_is_elsewhere_is_a_note_and_all_else_is_checked() -> None:
    report = report_of(p=pool(), a=policy("a", spec=keyed("keys")))
    assert told(report) == [("note", "a.yaml", 4, "spec.identities[0].apiKey.secretRef.name", None)]
    twice = report_of(p=pool(), a=policy("a", spec=keyed("keys")), b=policy("b", spec=keyed("keys")))
    assert [row[-1] for row in told(twice) if row[0] == Level.ERROR] == [Reason.IDENTITY_CONFLICTED]
    gateway = report_of(p=pool(spec=", gateway: {apiKeys: {secretRef: {name: keys}}}"))
    assert told(gateway) == [("note", "p.yaml", 4, "spec.gateway.apiKeys.secretRef.name", None)]
    encrypted = "apiVersion: v1\nkind: Secret\nmetadata: {name: keys}\ndata: {a: 'ENC[AES]'}\nsops: {}\n"
    assert [row[0] for row in told(report_of(p=pool(), a=policy("a", spec=keyed("keys")), s=encrypted))] == ["note"]


def test_no_remark_shows_a_key() -> None:
    weak = "apiVersion: v1\nkind: Secret\nmetadata: {name: keys, namespace: inference}\nstringData: {a: guess-me}\n"
    report = report_of(p=pool(), a=policy("a", spec=keyed("keys")), s=weak)
    assert [row[-1] for row in told(report)] == [Reason.WEAK_KEY]
    assert "guess-me" not in str(report)


def test_items_of_a_list_have_their_own_lines() -> None:
    item = "- apiVersion: evenhand.dev/v1alpha1\n  kind: TenantPolicy\n  metadata: {name: NAME}\n  spec:\n    weight: NUMBER\n"
    text = "kind: List\napiVersion: v1\nitems:\n" + "".join(
        item.replace("NAME", f"n{number}").replace("NUMBER", str(number)) for number in (1, 0, 2)
    )
    report = report_of(a=text)
    assert [row for row in told(report) if row[0] == "error"] == [
        ("error", "a.yaml", 13, "spec.weight", Reason.INVALID)
    ]
    assert report.num_policies == 2, "one that is bad holds up no other"


@pytest.mark.parametrize(
    ("text", "remarks"),
    [
        ("name: {{ .Values.name }}\n  x: [\n", 0),
        ("apiVersion: evenhand.dev/v1alpha1\nkind: {{ .Values.kind }}\n  x: [\n", 1),
        ("- a list\n", 0),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: x, labels: [a]}\n", 0),
        ("kind: List\nitems: [1, null, {kind: List, items: [2]}]\n", 0),
        ("apiVersion: evenhand.dev/v9\nkind: EnginePool\n", 1),
        ("kind: TenantPolicy\n", 1),
    ],
)
def test_files_of_others_are_passed_over_and_broken_ones_of_ours_are_not(text: str, remarks: int) -> None:
    assert report_of(a=text).count(Level.ERROR) == remarks
