"""Who may take part: claims, approvals, revocations, the fleet's authority."""
