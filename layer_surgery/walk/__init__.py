"""The walk over a model, one decoder layer at a time, and what observes it."""
