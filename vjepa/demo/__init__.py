"""Small experiments that run in minutes on a CPU, with toy data and toy modules of their own."""
