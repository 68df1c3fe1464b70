"""What people see on a terminal: the screen, the token view, the chat."""
