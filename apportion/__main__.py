"""`python -m apportion`: the same as the command `apportion`."""

from apportion.cli import main

main()
