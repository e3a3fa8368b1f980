"""`python integration/lora_patch install|check|report ...`"""

import sys

import service

sys.exit(service.main())
