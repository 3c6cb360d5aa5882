"""Policy directories: what is read, what is refused, and where the fault is said to be."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from evenhand_policy.files import FileProblem, PolicyFileError, load_policy_directory
from evenhand_policy.yaml_reader import MAX_FILE_BYTES, MAX_NESTING

KEY = "a-key-that-nobody-can-guess-0001"


def text_of(name: str, spec: str = "{}") -> str:
    return f"apiVersion: evenhand.dev/v1alpha1\nkind: TenantPolicy\nmetadata: {{name: {name}}}\nspec: {spec}\n"


Write = Callable[..., Path]


@pytest.fixture
def directory(tmp_path: Path) -> Write:
    def write(**files: str | bytes) -> Path:
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


def problems_of(directory: Path) -> list[FileProblem]:
    with pytest.raises(PolicyFileError) as caught:
        load_policy_directory(directory)
    return [problem._replace(path=os.path.relpath(problem.path, directory)) for problem in caught.value.problems]


def tenants_of(directory: Path) -> list[str]:
    return [tenant.tenant_id for tenant in load_policy_directory(directory).tenants]


def test_entries_of_all_files_make_one_config(directory: Write) -> None:
    pool = (
        "apiVersion: evenhand.dev/v1alpha1\nkind: EnginePool\nmetadata: {name: default}\n"
        "spec: {selector: {matchLabels: {a: b}}, prices: {outputToken: 7}}\n"
    )
    secret = f"apiVersion: v1\nkind: Secret\nmetadata: {{name: keys}}\nstringData: {{a: {KEY}}}\n"
    keyed = text_of("c", "{identities: [{name: k, type: APIKey, apiKey: {secretRef: {name: keys}}}]}")
    path = directory(a_yaml=f"---\n{text_of('b')}---\n---\n{text_of('a')}", b_yml=keyed + "---\n" + secret, c_json=pool)
    config = load_policy_directory(path)
    assert [tenant.tenant_id for tenant in config.tenants] == ["a", "b", "c"]
    assert len(config.tenants[2].key_hashes) == 1
    assert config.prices.output_token == 7


def test_the_digest_depends_on_what_the_files_say_alone(directory: Write) -> None:
    first = load_policy_directory(directory(a_yaml=text_of("a") + "---\n" + text_of("b")))
    (directory() / "a.yaml").unlink()
    second = load_policy_directory(directory(x_yaml=text_of("b"), y_yaml="# a comment\n" + text_of("a")))
    third = load_policy_directory(directory(y_yaml=text_of("a", "{weight: 2}")))
    assert first.digest() == second.digest() != third.digest()


def test_only_visible_policy_files_are_read(directory: Write) -> None:
    path = directory(a_yaml=text_of("a"), README_md="hello: [", _b_yaml="nonsense: [", sub__c_yaml=text_of("c"))
    os.mkfifo(path / "pipe.yaml")
    assert (path / ".b.yaml").exists()
    assert tenants_of(path) == ["a"]


def test_an_empty_directory_has_no_tenants(directory: Write) -> None:
    assert tenants_of(directory()) == []


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match="nowhere: cannot be read: No such file or directory"):
        load_policy_directory(tmp_path / "nowhere")


def test_a_config_map_mount_is_read_through_its_data_link(directory: Write) -> None:
    path = directory(__2026_1__unused="", v1__a_yaml=text_of("a"), v2__b_yaml=text_of("b"))
    (path / "..data").symlink_to("v1")
    (path / "a.yaml").symlink_to("..data/a.yaml")
    assert tenants_of(path) == ["a"]
    (path / "next").symlink_to("v2")
    (path / "next").rename(path / "..data")
    assert tenants_of(path) == ["b"]


def test_every_problem_is_told_with_its_line(directory: Write) -> None:
    bad = text_of("x", "\n  limits:\n    queueTimeout: 60") + "---\n" + text_of("y", "\n  weight: 1\n  weigth: 4")
    path = directory(a_yaml=bad, b_yaml="- just a list\n", c_yaml="kind: ConfigMap\n")
    assert problems_of(path) == [
        FileProblem("a.yaml", 6, "spec.limits.queueTimeout: expected a duration such as 500ms, 60s or 1m30s [Invalid]"),
        FileProblem("a.yaml", 13, "spec.weigth: unknown field; did you mean `weight`? [Invalid]"),
        FileProblem("b.yaml", 1, "entry 1 has no kind; only TenantPolicy, Secret and EnginePool belong here"),
        FileProblem("c.yaml", 1, "entry 1 has kind ConfigMap; only TenantPolicy, Secret and EnginePool belong here"),
    ]


def test_a_duplicate_tenant_names_both_files(directory: Write) -> None:
    path = directory(a_yaml=text_of("a", "{tenant: x}"), b_yaml="\n" + text_of("b", "\n  tenant: x"))
    (problem,) = problems_of(path)
    assert (problem.path, problem.line) == ("b.yaml", 6)
    assert "tenant x is already claimed by TenantPolicy default/a" in problem.message
    assert f"{path}/a.yaml:1" in problem.message


def test_the_same_object_twice_names_both_files(directory: Write) -> None:
    path = directory(a_yaml=text_of("a"), b_yaml=text_of("a"))
    (problem,) = problems_of(path)
    assert problem == FileProblem(
        "b.yaml", 3, f"TenantPolicy default/a is defined twice: here and at {path}/a.yaml:1; keep one"
    )


def test_two_pools_are_an_error_naming_both(directory: Write) -> None:
    pool = "apiVersion: evenhand.dev/v1alpha1\nkind: EnginePool\nmetadata: {name: NAME}\nspec: {selector: {matchLabels: {a: b}}}\n"
    path = directory(a_yaml=pool.replace("NAME", "x"), b_yaml=pool.replace("NAME", "y"))
    (problem,) = problems_of(path)
    assert problem.path == "b.yaml"
    assert f"{path}/a.yaml:1 and {path}/b.yaml:1" in problem.message


def test_a_policy_of_another_pool_than_the_given_one_is_an_error(directory: Write) -> None:
    pool = "apiVersion: evenhand.dev/v1alpha1\nkind: EnginePool\nmetadata: {name: gold}\nspec: {selector: {matchLabels: {a: b}}}\n"
    (problem,) = problems_of(directory(a_yaml=pool, b_yaml=text_of("a")))
    assert "[PoolNotFound]" in problem.message


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "the field a is set twice"),
        ("a:\n  {b: 1, b: 2}\n", 2, "the field b is set twice"),
        (BOMB, None, "aliases counted"),
        ("a: &a\n  b: *a\n", None, "an alias that refers to what it is part of"),
        ("a: &a [[*a]]\n", None, "an alias that refers to what it is part of"),
        ("[" * (MAX_NESTING + 1), 1, "nested deeper"),
        ("[" * 200_000, 1, "nested deeper"),
        ("a: !!python/object/apply:os.system [id]\n", 1, "a YAML tag"),
        ("a: !!set {x}\n", 1, "a YAML tag"),
        ("!!str {a: b}: c\n", 1, "a key that is not text"),
        ("a: !!int x\n", 1, "cannot be read"),
        ("a: " + "9" * 5000, 1, "cannot be read"),
        ("a: 0x_", 1, "cannot be read"),
        ("1: a\n", 1, "a key that is not text"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n", 3, "merge key"),
        ("a: b\n c: d\n", 2, "not valid YAML here"),
        ("a: *secret\n", 1, "not valid YAML here"),
        ("a: 'b\n", 2, "not valid YAML here"),
        ("a: \x00\n", None, "control character"),
        (b"ok: 1\na: \xff\n", 2, "not UTF-8"),
        ("a: b\n".encode("utf-16"), 1, "not UTF-8"),
        ("#" * (MAX_FILE_BYTES + 1), None, "larger than 4 MiB"),
    ],
)
def test_hostile_or_broken_yaml_is_refused_with_its_line(
    directory: Write, content: str | bytes, line: int | None, message: str
) -> None:
    (problem,) = problems_of(directory(a_yaml=content))
    assert message in problem.message
    assert line is None or problem.line == line
    assert len(problem.message) < 200


@pytest.mark.parametrize(
    "secret",
    [
        f"data: {{a: {KEY}}}",
        f"stringData: {{a: [{KEY}]}}",
        f"stringData: {KEY}",
        f"stringData: {{a: !{KEY} x}}",
        f"stringData: {{a: *{KEY}}}",
        f'stringData: {{a: "{KEY}\\q"}}',
        f"stringData: {{a: {KEY}: b}}",
    ],
)
def test_no_error_shows_a_key(directory: Write, secret: str) -> None:
    path = directory(a_yaml=f"apiVersion: v1\nkind: Secret\nmetadata: {{name: keys}}\n{secret}\n")
    with pytest.raises(PolicyFileError) as caught:
        load_policy_directory(path)
    assert KEY not in str(caught.value)


def test_times_stay_text(directory: Write) -> None:
    text = text_of("a").replace(
        "{name: a}", "{name: a, creationTimestamp: 2026-01-01T00:00:00Z, labels: {d: 2026-01-01}}"
    )
    assert tenants_of(directory(a_yaml=text)) == ["a"]


def test_the_text_of_an_error_is_bounded(directory: Write) -> None:
    path = directory(a_yaml="---\n".join(text_of(f"t{index}", "{weight: 0}") for index in range(50)))
    with pytest.raises(PolicyFileError) as caught:
        load_policy_directory(path)
    assert len(caught.value.problems) == 50
    assert str(caught.value).splitlines()[-1] == "and 30 more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            (text, 1_000_000)
            for text in ("1e+06", "1e6", "1E6", "1.0e6", "1_000_000", "0xF4240", "0o3641100", "+1000000.")
        ),
        ("0100", 64),
        ("0b11", 3),
        ("09", 9),
    ],
)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_numbers_are_read_as_kubectl_reads_them(directory: Write, text: str, expected: int, suffix: str) -> None:
    content = (
        '{"apiVersion": "evenhand.dev/v1alpha1", "kind": "TenantPolicy", "metadata": {"name": "a"}, '
        f'"spec": {{"limits": {{"tokensPerMinute": {text}}}}}}}'
    )
    config = load_policy_directory(directory(**{f"a.{suffix}": content}))
    assert config.tenants[0].limits.tokens_per_minute == expected


@pytest.mark.parametrize(
    "text", ["1:30", "1:30:15", "190:20:30.15", "1e400", "1.5", "-1", ".inf", ".nan", "'4'", "1e", "0x"]
)
def test_what_is_no_integer_for_kubectl_is_refused(directory: Write, text: str) -> None:
    policy = f"apiVersion: evenhand.dev/v1alpha1\nkind: TenantPolicy\nmetadata: {{name: a}}\nspec:\n  weight: {text}\n"
    with pytest.raises(PolicyFileError, match=r"a.yaml:5: spec.weight: expected an integer from 1 to 1000"):
        load_policy_directory(directory(**{"a.yaml": policy}))
