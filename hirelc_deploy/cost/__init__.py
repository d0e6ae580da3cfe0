"""What a policy costs before anything is built: parameters, operations, bytes, milliseconds."""
