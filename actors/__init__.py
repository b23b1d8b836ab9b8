"""Rollout: policies act in environments, and what happened becomes segments."""
