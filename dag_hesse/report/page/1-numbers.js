// Numbers as the text report writes them: Python's formats, which round ties to even where JavaScript rounds them up.

/** x with so many significant digits in exponential form, ties to even. */
function exponential(x, digits) {
  const [mantissa, power] = x.toExponential(60).split("e");
  const rest = mantissa.replace("-", "").replace(".", "").slice(digits);
  const tie = /^50*$/.test(rest);
  const cut = mantissa.slice(0, mantissa.indexOf(".") + digits);
  const even = tie && "02468".includes(cut.at(-1) === "." ? cut.at(-2) : cut.at(-1));
  return even ? `${cut.replace(/\.$/, "")}e${power}` : x.toExponential(digits - 1);
}

/** Python's f"{x:.2e}". */
function scientific(x) {
  const [mantissa, power] = exponential(x, 3).split("e");
  return `${mantissa}e${power[0]}${power.slice(1).padStart(2, "0")}`;
}

/** Python's f"{x:.3g}" for x of 1e-4 and more. */
function general(x) {
  if (x === 0) return "0";
  const text = exponential(x, 3);
  const [mantissa, power] = text.split("e");
  if (power >= 3) {
    const short = mantissa.includes(".") ? mantissa.replace(/\.?0+$/, "") : mantissa;
    return `${short}e${power[0]}${power.slice(1).padStart(2, "0")}`;
  }
  return String(Number(text));
}

function figure(x) {
  if (Number.isNaN(x)) return "-";
  if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
  const size = Math.abs(x);
  return (size >= 1e-3 && size < 1e4) || x === 0 ? general(x) : scientific(x);
}

function percent(share) {
  const x = 100 * share, low = Math.floor(x);
  return `${x - low === 0.5 ? low + (low % 2) : Math.round(x)}%`;
}

/** A value with its relative standard error, as report.text writes it. */
function number(value, error, method) {
  if (method === "z" && !Number.isNaN(value)) return "0";
  const shown = figure(value);
  if (!(error > 0 && value)) return shown;
  const share = error / Math.abs(value);
  return `${shown} ±${share >= 0.005 ? percent(share) : "<0.5%"}`;
}

/** At most six characters, for a cell. */
function brief(x) {
  if (Number.isNaN(x)) return "–";
  if (x === Infinity) return "∞";
  if (x < 0) return `−${brief(-x)}`;
  if (x === 0 || (x >= 0.01 && x < 1000)) return String(Number(x.toPrecision(2)));
  return x.toExponential(1).replace("e+", "e");
}
