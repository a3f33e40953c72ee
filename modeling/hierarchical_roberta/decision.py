"""From scores to labels: the label with the highest log score plus class bias.

B documents, K labels.
Pushed to the hub with the model; imports nothing else from the project.
"""

from collections.abc import Sequence

import numpy as np


def decide(log_scores_BK: np.ndarray, class_biases: Sequence[float] | np.ndarray | None) -> np.ndarray:
    """Class ids (B,) of the highest `log_scores_BK + class_biases`; of equal ones the first.

    Args:
        log_scores_BK: log-probabilities, or anything that differs from them by a constant for each document, such as
            logits / temperature, (B, K).
        class_biases: (K,), see `modeling/training/decision.py`. None: the label with the highest score.
    """
    scores_BK = np.asarray(log_scores_BK, dtype=np.float64)
    if class_biases is not None:
        scores_BK = scores_BK + np.asarray(class_biases, dtype=np.float64)
    return scores_BK.argmax(axis=-1)
