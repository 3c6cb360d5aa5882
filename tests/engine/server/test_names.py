"""Models are served under the names that they were given."""

import openai
import pytest

from .conftest import Say, Serve


def test_served_model_names(serve: Serve, say: Say) -> None:
    client = serve(say("some words"), served_model_names=("a", "b/c")).client()
    assert [model.id for model in client.models.list().data] == ["a", "b/c"]
    assert client.completions.create(model="b/c", prompt="x").model == "b/c"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="tiny", prompt="x")
    assert caught.value.code == "model_not_found"
