"""Steering in other people's training loops; every module imports its host when it is used, not before.

``steering`` is for loops of PyTorch, Lightning and Accelerate, ``trainer`` for those of transformers and TRL.
``README.md`` beside this file says how each is used.
"""

from drrho.integrations.reference_losses import ReferenceLosses
from drrho.integrations.steering import Steering, SteeringStep

__all__ = ["ReferenceLosses", "Steering", "SteeringStep"]
