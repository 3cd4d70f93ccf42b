"""Routed experts as one operation: bring tokens to their experts, multiply, and sum what comes back."""
