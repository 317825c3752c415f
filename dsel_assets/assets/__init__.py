"""The assets of a task, thin: read, call one step, say what happened."""
