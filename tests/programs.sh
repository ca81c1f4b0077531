#!/bin/sh
# Installs Debian's programs that tests drive: Chromium with its driver, for the report's page, and fish, for completion.
# Where that cannot be, it says why and ends well: those tests are then skipped.
if command -v chromium >/dev/null && command -v chromedriver >/dev/null && command -v fish >/dev/null; then exit 0; fi
if ! command -v apt-get >/dev/null; then echo "no Chromium, no fish: there is no apt-get here"; exit 0; fi
if [ "$(id -u)" != 0 ]; then echo "no Chromium, no fish: apt-get needs root"; exit 0; fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
{ apt-get -q update && apt-get -q install -y --no-install-recommends chromium chromium-driver fish; } >"$log" 2>&1 ||
  { echo "no Chromium, no fish: apt-get failed"; tail -3 "$log"; }
exit 0
