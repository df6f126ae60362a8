"""Networks: tokenizer, rotary positions, attention backends, encoder, predictor."""
