"""One rank's training: loop, step, optimizer, checkpoint, metrics, tracking, evaluation, export, report."""
