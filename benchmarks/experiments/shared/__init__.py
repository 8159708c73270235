"""What the experiments have in common: data, training, jobs, tables, figures, records."""
