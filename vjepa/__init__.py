"""The model and how it learns: encoder, predictor, masking, objectives, trainer, hub."""
