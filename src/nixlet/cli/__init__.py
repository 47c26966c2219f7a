"""The command line: one module a verb. Verbs parse, call and print; they hold no rules."""
