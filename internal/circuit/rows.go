package circuit

import "slices"

// maxRuns bounds what is remembered of the attempts that did not succeed.
const maxRuns = 64

// rows are the rows of failures of a closed breaker. A row is made of attempts
// that were admitted one after the other and have all failed; ignored ones in
// between are passed over. An attempt that has succeeded, or is still under way,
// is in no run and so stands between two of them. That is why nobody needs to
// tell of a success, and why a row does not depend on how long anything takes.
type rows struct {
	runs []run // by number, with a gap between any two
}

// A run is a stretch of numbers whose attempts have all failed or were ignored.
type run struct {
	first, last uint64
	failures    int
}

// add takes down that the attempt with this number has failed or was ignored,
// and returns the failures of the run that it now belongs to. An attempt whose
// body breaks off after it has been taken down already counts once more only if
// it is new.
func (r *rows) add(number uint64, failed bool) int {
	added := run{number, number, 0}
	if failed {
		added.failures = 1
	}
	// i is where the first run stands that ends at number-1 or later.
	i, _ := slices.BinarySearchFunc(r.runs, number, func(a run, n uint64) int {
		if a.last+1 < n {
			return -1
		}
		return 1
	})
	j := i
	for j < len(r.runs) && r.runs[j].first <= number+1 { // at most the run before and the one behind
		added.first = min(added.first, r.runs[j].first)
		added.last = max(added.last, r.runs[j].last)
		added.failures += r.runs[j].failures
		j++
	}
	r.runs = slices.Replace(r.runs, i, j, added)
	if len(r.runs) > maxRuns {
		r.runs = slices.Delete(r.runs, 0, 1) // the oldest
	}
	return added.failures
}

// current returns the failures of the row that the next attempt would go on
// with, when last is the number given last.
func (r *rows) current(last uint64) int {
	if n := len(r.runs); n > 0 && r.runs[n-1].last == last {
		return r.runs[n-1].failures
	}
	return 0
}
