"""Where a step's time goes: roofline profiles and measured operators of the machine at hand."""
