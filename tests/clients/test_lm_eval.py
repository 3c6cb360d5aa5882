"""lm-eval's figures by the server are those of transformers with the same weights, on a small task made here."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from .conftest import MODEL, Served

pytestmark = pytest.mark.timeout(1200)

POINTS = 0.001  # 0.1 points of a hundred
NUM_DOCUMENTS = 48
NAMES = ["choices", "generated", "rolled"]
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Poland": "Warsaw",
    "Cuba": "Havana",
}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}}"
num_fewshot: 0
{more}
"""
CHOICES = """\
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATED = """\
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], do_sample: false, temperature: 0.0, max_gen_toks: 6}
metric_list: [{metric: exact_match, regexes_to_ignore: [",", "\\\\."]}]
"""
ROLLED = """\
doc_to_target: "{{question}}{{choices[answer]}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of three tasks over the same made documents: sequences to go on with, and capitals."""
    directory, chance = tmp_path_factory.mktemp("tasks"), random.Random(5)
    documents = []
    for number in range(NUM_DOCUMENTS):
        if number % 2:
            country, answer = chance.choice(list(CAPITALS.items()))
            question, wrong = f"The capital of {country} is", chance.sample(sorted({*CAPITALS.values()} - {answer}), 3)
        else:
            start, step = chance.randrange(1, 40), chance.randrange(1, 9)
            question = ", ".join(str(start + step * i) for i in range(5)) + ","
            answer = str(start + 5 * step)
            wrong = [str(int(answer) + i) for i in (1, 2, 10)]
        choices = [answer, *wrong]
        chance.shuffle(choices)
        index = choices.index(answer)
        documents.append({"question": question, "choices": [f" {choice}" for choice in choices], "answer": index})
    data = directory / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    kinds = {"choices": ("multiple_choice", CHOICES), "generated": ("generate_until", GENERATED)}
    for name, (output_type, more) in (kinds | {"rolled": ("loglikelihood_rolling", ROLLED)}).items():
        text = TASK.format(name=f"evenhand_{name}", data=data, output_type=output_type, more=more)
        (directory / f"{name}.yaml").write_text(text)
    return directory


def evaluate(tasks: Path, names: list[str], model: str, arguments: dict[str, Any], **options: Any) -> dict[str, float]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[f"evenhand_{name}" for name in names],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return {
        f"{task} {metric}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def assert_equal(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert set(ours) == set(theirs) and ours
    assert all(abs(ours[name] - value) <= POINTS for name, value in theirs.items()), (ours, theirs)


@pytest.fixture(scope="module")
def reference(served: Served, tasks: Path) -> dict[str, float]:
    return evaluate(tasks, NAMES, "hf", hf(served))


def hf(served: Served) -> dict[str, Any]:
    return {"pretrained": str(served.directory), "dtype": "float32", "device": "cpu", "batch_size": 8}


@pytest.mark.parametrize("tokenized", [True, False])
def test_completions(served: Served, tasks: Path, reference: dict[str, float], tokenized: bool) -> None:
    arguments = {
        "model": MODEL,
        "base_url": f"{served.openai_url}/completions",
        "tokenizer": str(served.directory),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": tokenized,
        "num_concurrent": 4,
        "max_retries": 1,
        "max_length": 2048,
    }
    ours = evaluate(tasks, NAMES, "local-completions", arguments)
    assert_equal(ours, reference)
    assert reference["evenhand_choices acc,none"] > 0.4, "a task that the model knows something of"


def test_chats(served: Served, tasks: Path) -> None:
    arguments = {
        "model": MODEL,
        "base_url": f"{served.openai_url}/chat/completions",
        "num_concurrent": 4,
        "max_retries": 1,
    }
    ours = evaluate(tasks, ["generated"], "local-chat-completions", arguments, apply_chat_template=True)
    assert_equal(ours, evaluate(tasks, ["generated"], "hf", hf(served), apply_chat_template=True))
