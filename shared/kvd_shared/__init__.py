"""What the daemon, the workers and the admin command have in common. Imports neither torch nor triton."""
