"""`python -m expert_speculation` is the command `expert-speculation`."""

from expert_speculation.command import main

main()
