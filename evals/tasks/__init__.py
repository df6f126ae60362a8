"""One module per kind of task; each turns features of a training and a test set into scores."""
