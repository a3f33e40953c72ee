"""Handler that Inference Endpoints load from the model's repository, for requests such as

    {"inputs": "Once upon a time …"}
    {"inputs": ["One text", {"text": "Another"}], "parameters": {"top_k": 2, "evidence": 1}}

Pushed to the hub with the model; imports nothing else from the project.
"""

from pathlib import Path
from typing import Any

from transformers import pipeline


class EndpointHandler:
    """The pipeline of the model in `path` (by default, in the folder of this file)."""

    def __init__(self, path: str = ""):
        folder = str(path or Path(__file__).parent)
        self.classify = pipeline("text-classification", model=folder, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> Any:
        """Return what the pipeline does for `inputs`, with the options in `parameters`; JSON in, JSON out.

        Raises:
            ValueError: a request that cannot be answered. Endpoints return its message with status 400.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if not isinstance(inputs, str | list | dict):
            raise ValueError(
                f'`inputs` must be a text, {{"text": text}} or a list of them, got {type(inputs).__name__}.'
            )
        if not isinstance(parameters, dict):
            raise ValueError(f"`parameters` must be an object with options, got {type(parameters).__name__}.")
        return self.classify(inputs, **parameters)
