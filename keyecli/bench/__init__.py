"""What `keye bench` runs on this machine; nothing else imports it."""
