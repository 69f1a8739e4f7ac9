"""The planner against closed forms, against another planner, and against the real system."""
