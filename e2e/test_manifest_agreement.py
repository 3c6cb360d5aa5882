"""Manifests and programs agree: every argument, variable, path, port, name and second is what the other side means by it."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from cluster import build
from evenhand_engine.commands.cli import main as engine_main
from evenhand_operator.cli import main as operator_main
from evenhand_policy.bootstrap import MAX_PARTS, secret_name
from evenhand_policy.push_document import MAX_DOCUMENT_BYTES
from evenhand_policy.push_protocol import POD_TOKEN_AUDIENCE
from harness.installation import PORT, REPOSITORY, Installation
from harness.objects import ADMIN_PORT

Object = dict[str, Any]
PROGRAMS: dict[str, click.Command] = {"evenhand": engine_main, "evenhand-operator": operator_main}
IMAGES = REPOSITORY / "manifests/images"
PACKAGES = IMAGES / "packages"
CONVENTIONAL = {"HOME", "CUPY_CACHE_DIR"}
"""Variables that libraries read; all others our own code must."""


@pytest.fixture(scope="module", params=["dev", "prod"])
def rendered(request: pytest.FixtureRequest) -> list[Object]:
    """What kustomize makes of an overlay."""
    if missing := build.missing_programs():
        pytest.skip(f"no kubectl: {', '.join(missing)} not built (make cluster)")
    command = [str(build.programs()["kubectl"]), "kustomize", f"{REPOSITORY}/manifests/overlays/{request.param}"]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, check=True, text=True).stdout))


def of_kind(rendered: list[Object], kind: str) -> dict[str, Object]:
    """Objects by name."""
    return {each["metadata"]["name"]: each for each in rendered if each["kind"] == kind}


def containers(rendered: list[Object]) -> list[Object]:
    """The container of each Deployment."""
    return [each["spec"]["template"]["spec"]["containers"][0] for each in of_kind(rendered, "Deployment").values()]


def options(container: Object) -> Object:
    """Values of the program's options, as it parses the container's command line. Raises UsageError."""
    arguments: list[str] = [*container["command"], *container["args"]]
    program = arguments.pop(0)
    command = PROGRAMS[program]
    if isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    return command.make_context(program, arguments).params


def ports(container: Object) -> dict[str, int]:
    """Container ports by name."""
    return {each["name"]: each["containerPort"] for each in container["ports"]}


def test_programs_take_every_argument(rendered: list[Object]) -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts")
    for container in containers(rendered):
        assert container["command"][0] in scripts.names
        assert options(container)
    with pytest.raises(click.NoSuchOption):
        options({"command": ["evenhand-operator"], "args": ["--no-such-option"]})


def test_programs_read_every_variable(rendered: list[Object]) -> None:
    """Somewhere, by its name in quotes."""
    packages = [REPOSITORY / "engine", REPOSITORY / "operator", REPOSITORY / "cuda"]
    code = "".join(path.read_text() for package in packages for path in package.rglob("*.py"))
    for container in containers(rendered):
        names = {each["name"] for each in container["env"]} - CONVENTIONAL
        assert [name for name in names if not re.search(f"[\"']{name}[\"']", code)] == []


def test_programs_listen_where_the_manifests_say(rendered: list[Object]) -> None:
    operator, engine = sorted((options(each) | ports(each) for each in containers(rendered)), key=len)
    assert operator["metrics_port"] == operator["metrics"]
    assert (engine["port"], engine["admin_port"]) == (engine["http"], engine["admin"]) == (PORT, ADMIN_PORT)
    assert engine["host"] == engine["admin_host"] == operator["host"] == "::"


def test_network_policies_open_ports_that_are_there(rendered: list[Object]) -> None:
    policies, deployments = of_kind(rendered, "NetworkPolicy"), of_kind(rendered, "Deployment")
    assert policies.keys() == deployments.keys(), "nothing runs without one"
    for name, policy in policies.items():
        template = deployments[name]["spec"]["template"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        assert opened == ports(template["spec"]["containers"][0]).keys()
    [push, *_] = policies["evenhand-operator"]["spec"]["egress"]
    assert [port["port"] for port in push["ports"]] == [ADMIN_PORT]


def test_monitoring_reaches_the_metrics_by_tenant_and_the_operators(rendered: list[Object]) -> None:
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    for name, port in (("evenhand-engine", "admin"), ("evenhand-operator", "metrics")):
        rules = of_kind(rendered, "NetworkPolicy")[name]["spec"]["ingress"]
        assert [rule["ports"] for rule in rules if monitoring in rule["from"]] == [[{"port": port}]]


def test_pods_have_time_to_leave(rendered: list[Object]) -> None:
    pod = of_kind(rendered, "Deployment")["evenhand-engine"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    needed = container["lifecycle"]["preStop"]["sleep"]["seconds"] + options(container)["drain_timeout"]
    assert pod["terminationGracePeriodSeconds"] >= needed + 10


def test_disruption_budgets_and_accounts_are_of_the_pods(rendered: list[Object]) -> None:
    budgets, accounts = of_kind(rendered, "PodDisruptionBudget"), of_kind(rendered, "ServiceAccount")
    for name, deployment in of_kind(rendered, "Deployment").items():
        template = deployment["spec"]["template"]
        assert budgets[name]["spec"]["selector"] == deployment["spec"]["selector"]
        assert budgets[name]["spec"]["maxUnavailable"] == 1
        account = accounts[template["spec"]["serviceAccountName"]]
        assert account["metadata"]["namespace"] == deployment["metadata"]["namespace"]


def test_pods_mount_what_the_operator_writes_where_the_engine_reads(rendered: list[Object]) -> None:
    [pool] = of_kind(rendered, "EnginePool").values()
    pod = of_kind(rendered, "Deployment")["evenhand-engine"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    told = options(container)
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounted = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    assert told["pool"] == f"{pool['metadata']['namespace']}/{pool['metadata']['name']}"
    manifest, *parts = (source["secret"] for source in mounted[str(told["bootstrap"])]["projected"]["sources"])
    name = pool["metadata"]["name"]
    assert [part["name"] for part in (manifest, *parts)] == [secret_name(name, i) for i in (None, *range(MAX_PARTS))]
    assert "optional" not in manifest, "engines wait until they can know whom to believe"
    assert all(part["optional"] for part in parts), "the first engines start before there is a document"
    [token] = mounted[str(told["pod_token"].parent)]["projected"]["sources"]
    assert token["serviceAccountToken"]["audience"] == POD_TOKEN_AUDIENCE
    assert token["serviceAccountToken"]["path"] == told["pod_token"].name
    limit = re.fullmatch(r"(\d+)Mi", mounted[str(told["last_good"].parent)]["emptyDir"]["sizeLimit"])
    assert limit and int(limit[1]) * 2**20 > 2 * MAX_DOCUMENT_BYTES + 2**20, (
        "the old file, and the one that replaces it"
    )
    assert pool["spec"]["selector"]["matchLabels"].items() <= {"app": "evenhand-engine"}.items()


def test_every_probe_is_answered_by_the_running_programs(installation: Installation) -> None:
    """The readiness probes are run by the pod runner; nothing here runs the others."""
    for pod in installation.all_pods():
        container = pod["spec"]["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            get = container[probe]["httpGet"]
            url = f"http://{pod['status']['podIP']}:{ports(container)[get['port']]}{get['path']}"
            with urllib.request.urlopen(url, timeout=60) as response:
                assert response.status == 200


# ---- images


def stages() -> dict[str, str]:
    """Instructions of each stage of the Dockerfile, by its name; lines that go on are joined."""
    text = (IMAGES / "Dockerfile").read_text().replace("\\\n", " ")
    _, *found = re.split(r"^FROM \S+ AS (\S+)\n", text, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def test_every_image_that_manifests_name_is_a_stage_that_runs_as_they_say(rendered: list[Object]) -> None:
    for deployment in of_kind(rendered, "Deployment").values():
        pod = deployment["spec"]["template"]["spec"]
        [container] = pod["containers"]
        stage = stages()[container["image"].removeprefix("evenhand.dev/").partition(":")[0]]
        context = pod["securityContext"]
        assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in stage
        [program, *_] = container["command"]
        assert f'CMD ["{program}"' in stage


def test_images_are_made_of_files_that_there_are() -> None:
    ignored = (IMAGES / "Dockerfile.dockerignore").read_text()
    assert "\n!manifests\nmanifests/*\n!manifests/images\n" in ignored
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (IMAGES / "Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (REPOSITORY / name).exists()
        assert f"!{name.partition('/')[0]}\n" in ignored


def test_operators_image_has_what_the_operator_imports() -> None:
    installed = (PACKAGES / "operator.in").read_text().splitlines()
    imported = set[str]()
    for package in ("operator/evenhand_operator", "engine/evenhand_policy"):
        for path in (REPOSITORY / package).rglob("*.py"):
            imported |= imports(path)
    ours = {"evenhand_operator", "evenhand_policy"}
    distributions = importlib.metadata.packages_distributions()
    needed = {distributions[name][0].lower().replace("_", "-") for name in imported - ours - sys.stdlib_module_names}
    assert {line for line in installed if not line.startswith("#")} == needed


@pytest.mark.parametrize("image", ["operator", "engine", "engine-cuda", "model"])
def test_images_have_the_versions_that_are_tested(image: str) -> None:
    tested = locked(REPOSITORY / "requirements.lock")
    of_image = locked(PACKAGES / f"{image}.lock")
    assert of_image.items() <= tested.items(), "run make lock"


def test_the_image_for_cpus_has_nothing_of_cuda() -> None:
    of_image = locked(PACKAGES / "engine.lock")
    assert "torch" in of_image
    assert [name for name in of_image if re.match("nvidia|cuda|cupy|triton", name)] == []
    assert locked(PACKAGES / "engine-cuda.lock").keys() > of_image.keys()


def locked(path: Path) -> dict[str, str]:
    """Versions by package."""
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", path.read_text(), re.MULTILINE))


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names
