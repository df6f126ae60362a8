"""What is learned: a target and weighted terms."""
