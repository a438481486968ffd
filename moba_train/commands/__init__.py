"""What each sub-command does: the glue that joins configuration, data, engine, training and evaluation."""
