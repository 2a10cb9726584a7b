"""Memory as a dial: how an evaluation is cut, what that holds, which cut is best, and what moves where meanwhile."""
