"""`modelworker demo`: the main job on this machine's CPU, shown with figures and asserted."""
