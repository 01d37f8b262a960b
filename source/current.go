// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"fmt"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
)

// Current lists all objects once more, and reports whether Service, Pod and Node answer with just those: changes
// take a moment from a watch to here. If so it returns all that Next ever returned or has still to return, but
// for what is gone.
func (o *Objects) Current(ctx context.Context) (all Dirty, current bool, err error) {
	for _, kind := range []struct {
		watch    cache.ListerWatcher
		informer cache.SharedIndexInformer
	}{{o.watches.Services, o.services}, {o.watches.EndpointSlices, o.slices}, {o.watches.Pods, o.pods}, {o.watches.Nodes, o.nodes}} {
		list, err := cache.ToListerWatcherWithContext(kind.watch).ListWithContext(ctx, metav1.ListOptions{})
		if err != nil {
			return Dirty{}, false, fmt.Errorf("list the objects once more: %w", err)
		}
		same, err := holds(kind.informer.GetStore(), list)
		if err != nil || !same {
			return Dirty{}, false, err
		}
	}
	return o.all(), true, nil
}

// holds reports whether a store has the objects of a list in the same versions, and no others.
func holds(store cache.Store, list runtime.Object) (bool, error) {
	items, err := meta.ExtractList(list)
	if err != nil {
		return false, fmt.Errorf("list the objects once more: %w", err)
	}
	if len(items) != len(store.ListKeys()) {
		return false, nil
	}
	for _, item := range items {
		listed, err := meta.Accessor(item)
		if err != nil {
			return false, fmt.Errorf("list the objects once more: %w", err)
		}
		held, ok, err := store.Get(item)
		if err != nil {
			return false, fmt.Errorf("list the objects once more: %w", err)
		}
		if !ok || held.(metav1.Object).GetResourceVersion() != listed.GetResourceVersion() {
			return false, nil
		}
	}
	return true, nil
}
